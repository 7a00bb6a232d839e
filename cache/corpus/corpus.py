"""A corpus: sealed rows of tokens with one tokenizer, on a flat token axis without holes.

On disk `corpora/<name>/` is a Zarr group whose attributes are the seal: the record that is created last, if absent,
and makes the corpus exist. It names the child group that holds the arrays. `cache/FORMAT.md` has the layout.

Shape legend:  P positions, R rows, S shards, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.annotations import AnnotatedCorpus, list_annotations, read_annotation
from potstill.cache.corpus.keys import KEY_BYTES, KEY_ORDER, SORTED_KEYS, KeyIndex, KeysInMemory, row_key
from potstill.cache.corpus.seal import CorpusSpec, corpus_path, read_seal
from potstill.cache.corpus.tokenizer import sealed_tokenizer
from potstill.cache.corpus.tokenizer_files import (
    SEALED_FILES,
    SpecialTokens,
    parse_tokenizer_files,
    sealed_tokenizer_files,
)
from potstill.cache.errors import CorruptSegment, FormatError, InvalidInput, UnsupportedField
from potstill.cache.forks import cached
from potstill.cache.plurals import counted
from potstill.cache.store import GroupReader, Reading, Root
from potstill.cache.store.chunks import ReadRequest, read_together
from potstill.cache.types import Tokens

# Row starts are read in pages of this many: the chunk in which `ingest` writes them.
_PAGE_ROWS = 4096
_SCANNED_ROWS = 1 << 20


class CorpusArrays(Protocol):
    """Source of a corpus' arrays: a published group (`GroupReader`), or a service that has one."""

    @property
    def path(self) -> str:
        """Name of the source in errors."""

    def has(self, name: str) -> bool:
        """Tell whether there is an array of this name."""

    def expect(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> str:
        """Check an array's shape and dtype, and return the dtype's name."""

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read `array[start:stop]`."""

    def read_all(self, name: str) -> NDArray[Any]:
        """Read the whole array."""

    def corrupt_objects(self) -> list[str]:
        """One line for each object that is not what was published."""


class Corpus:
    """A sealed corpus, for reading: `len(corpus)` rows; `corpus.row(i)` has the tokens of row i."""

    def __init__(self, root: Root, name: str, spec: CorpusSpec, reader: CorpusArrays) -> None:
        self.name = name
        self.spec = spec
        self._root = root
        self._reader = reader

    @classmethod
    def open(cls, root: Root, name: str, reading: Reading | None = None) -> Corpus:
        """Open a corpus by name. Reads go through `reading`, by default a small chunk cache of its own.

        Raises:
            UnknownCorpus: no corpus is sealed under that name. FormatError: this version cannot read the seal.
        """
        spec = read_seal(root, name)
        return cls(root, name, spec, GroupReader(root, f"{corpus_path(name)}/{spec.data}", spec.objects, reading))

    def __len__(self) -> int:
        return self.spec.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address, which is opened again."""
        reading = self._reader.reading if isinstance(self._reader, GroupReader) else None
        return Corpus.open, (self._root, self.name, reading)

    @property
    def num_positions(self) -> int:
        """Number of positions P, which is the number of tokens of all rows."""
        return self.spec.num_positions

    @property
    def num_shards(self) -> int:
        """Number of shards S."""
        return self.spec.num_shards

    @property
    def tokenizer_sha256(self) -> str:
        """Fingerprint of the tokenizer (`potstill.cache.corpus.tokenizer.fingerprint`)."""
        return self.spec.tokenizer_sha256

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id."""
        return self.spec.vocab_size

    @property
    def fingerprint(self) -> str:
        """sha256 of the content, in hex."""
        return self.spec.fingerprint

    @cached
    def row_starts(self) -> NDArray[np.int64]:
        """Positions [R+1] int64 at which each row starts, then P.

        It stays in memory, 8 bytes a row; `starts` and `row_ranges` read only what is asked for.
        """
        return self._axis("row_starts", self.spec.num_rows, self.spec.num_positions)

    @cached
    def shard_rows(self) -> NDArray[np.int64]:
        """Rows [S+1] int64 at which each shard starts, then R."""
        return self._axis("shard_rows", self.spec.num_shards, self.spec.num_rows)

    @cached
    def shard_starts(self) -> NDArray[np.int64]:
        """Positions [S+1] int64 at which each shard starts, then P."""
        if self._reader.has("shard_starts"):
            return self._axis("shard_starts", self.spec.num_shards, self.spec.num_positions)
        # Format 1 has no such array, and needs the starts of all rows for it.
        return self.row_starts[self.shard_rows]

    @cached
    def document_rows(self) -> NDArray[np.int64]:
        """Rows [D+1] int64 at which each document starts, then R.

        Corpora that do not say (formats 1 and 2, and rows that came without documents) have the safe superset: a
        document is a run of rows of full length and the next shorter one, so that no document lies in two of them.
        """
        if self.spec.num_documents is None:
            return self._runs_of_full_rows()
        return self._axis("document_rows", self.spec.num_documents, self.spec.num_rows)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read `document_rows[start:stop]` of a corpus that says which row is of which document, and no more.

        Raises:
            UnsupportedField: it does not say. CorruptSegment: stored bytes are damaged.
        """
        if self.spec.num_documents is None:
            raise UnsupportedField(f"corpus {self.name!r} does not say which row is of which document")
        self._reader.expect("document_rows", (self.num_documents + 1,), ("int64",))
        return self._reader.read("document_rows", start, stop).astype(np.int64, copy=False)

    @property
    def num_documents(self) -> int:
        """Number of documents D, by `document_rows`."""
        return len(self.document_rows) - 1 if self.spec.num_documents is None else self.spec.num_documents

    @property
    def has_loss_mask(self) -> bool:
        """Tell whether some target is not to be learnt."""
        return self.spec.num_taught is not None

    def loss_mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Read for the positions `start` to `stop` whether their target is to be learnt, [stop - start] bool.

        Target t is the distribution of the token after `row[t]`: it is the next token that is taught, or is not.
        """
        if not self.has_loss_mask:
            return np.ones(stop - start, np.bool_)
        self._reader.expect("loss_mask", (self.num_positions,), ("bool",))
        return self._reader.read("loss_mask", start, stop).astype(np.bool_, copy=False)

    def take_loss_mask(self, rows: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Read the loss mask of rows in any order, each [T] bool; raises as `take` does."""
        if not self.has_loss_mask:
            return [np.ones(stop - start, np.bool_) for start, stop in self.row_ranges(rows).tolist()]
        self._reader.expect("loss_mask", (self.num_positions,), ("bool",))
        return [found.astype(np.bool_, copy=False) for found in self._spans("loss_mask", rows)]

    def row(self, index: int) -> Tokens:
        """Read the tokens of one row, [T] uint32."""
        return self.rows(index, index + 1)[0]

    def rows(self, start: int, stop: int) -> list[Tokens]:
        """Read the tokens of rows `start` to `stop`, each [T] uint32.

        Raises:
            InvalidInput: the range is not inside the corpus.
        """
        starts = self.starts(start, stop)
        flat = self.tokens(int(starts[0]), int(starts[-1]))
        return [flat[a - starts[0] : b - starts[0]] for a, b in pairwise(starts)]

    def take(self, rows: Sequence[int]) -> list[Tokens]:
        """Read the tokens of rows in any order, each [T] uint32.

        Raises:
            InvalidInput: a row is not in the corpus.
        """
        self._reader.expect("tokens", (self.num_positions,), ("uint32",))
        return [found.astype(np.uint32, copy=False) for found in self._spans("tokens", rows)]

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read the positions [stop - start + 1] int64 at which rows `start` to `stop` start, then the last one's end.

        Raises:
            InvalidInput: the range is not inside the corpus. CorruptSegment: stored bytes are damaged.
        """
        if not 0 <= start <= stop <= len(self):
            raise InvalidInput(
                f"rows {start} to {stop} are outside corpus {self.name!r} of {counted(len(self), 'row')}"
            )
        self._reader.expect("row_starts", (len(self) + 1,), ("int64",))
        starts = self._reader.read("row_starts", start, stop + 1).astype(np.int64, copy=False)
        if starts[0] < start or starts[-1] > self.num_positions or (np.diff(starts) < 1).any():
            raise CorruptSegment(f"{self._reader.path}/row_starts does not rise from row {start} to {stop}")
        return starts

    def row_ranges(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the positions [N, 2] int64 at which each of N rows starts and ends; rows may repeat, in any order.

        Raises:
            InvalidInput: a row is not in the corpus, or no whole number. CorruptSegment: stored bytes are damaged.
        """
        wanted = _row_numbers(rows)
        outside = (wanted < 0) | (wanted >= len(self))
        if outside.any():
            row = wanted[outside.argmax()]
            raise InvalidInput(f"row {row} is outside corpus {self.name!r} of {counted(len(self), 'row')}")
        ranges = np.empty((len(wanted), 2), dtype=np.int64)
        pages = wanted // _PAGE_ROWS
        for page in np.unique(pages):
            here = np.flatnonzero(pages == page)
            first = int(wanted[here].min())
            starts = self.starts(first, int(wanted[here].max()) + 1)
            ranges[here, 0], ranges[here, 1] = starts[wanted[here] - first], starts[wanted[here] - first + 1]
        return ranges

    def require_positions(self, start: int, stop: int) -> None:
        """Check that positions `start` to `stop` are in the corpus, and not none.

        Raises:
            InvalidInput: they are not.
        """
        if not 0 <= start < stop <= self.num_positions:
            raise InvalidInput(
                f"positions {start} to {stop} are outside corpus {self.name!r} of {self.num_positions} positions"
            )

    def tokens(self, start: int, stop: int) -> Tokens:
        """Read the tokens at positions `start` to `stop`, [stop - start] uint32."""
        self._reader.expect("tokens", (self.num_positions,), ("uint32",))
        return self._reader.read("tokens", start, stop).astype(np.uint32, copy=False)

    def row_keys(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Read the keys of rows `start` to `stop`, [stop - start, 16] uint8."""
        self._reader.expect("row_keys", (len(self), KEY_BYTES), ("uint8",))
        return self._reader.read("row_keys", start, stop).astype(np.uint8, copy=False)

    def key(self, row: Tokens) -> bytes:
        """Key that a row of tokens has under this corpus' tokenizer; the row need not be in it."""
        return row_key(self.tokenizer_sha256, row)

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Look up rows by their keys: the first row with each key, or None.

        Many keys at a time cost fewest reads. A corpus of format 1 has no sorted keys on disk; they are then made in
        memory, 24 bytes a row.
        """
        return self._key_index.find(keys)

    def shard_of_row(self, row: int) -> int:
        """Shard that a row belongs to."""
        return int(np.searchsorted(self.shard_rows, row, side="right")) - 1

    @cached
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that the corpus was made with, from the copy beside the tokens; raises as `tokenizer_text`."""
        return Tokenizer.from_str(b"".join(self.tokenizer_text()).decode())

    def tokenizer_text(self) -> Iterator[bytes]:
        """Read that copy as it was sealed, JSON in UTF-8, in pieces; raises as `sealed_tokenizer`."""
        assert isinstance(self._reader, GroupReader), "a service's corpus is asked for its tokenizer"
        return sealed_tokenizer(self._reader)

    @cached
    def tokenizer_files(self) -> dict[str, str]:
        """Texts of the files beside the tokenizer, by name; raises as `sealed_tokenizer_files`, and FormatError."""
        return parse_tokenizer_files(b"".join(self.tokenizer_files_text()), f"{self._reader.path}/{SEALED_FILES}")

    @property
    def tokenizer_files_objects(self) -> list[str]:
        """sha256 of the objects that hold those files, which the fingerprint does not cover; none where none are."""
        return [item.sha256 for item in self.spec.objects if item.path.startswith(f"{SEALED_FILES}/")]

    def tokenizer_files_text(self) -> Iterator[bytes]:
        """Read those files as they were sealed, one JSON object in UTF-8, in pieces; raises as `sealed_text`."""
        assert isinstance(self._reader, GroupReader), "a service's corpus is asked for its files"
        return sealed_tokenizer_files(self._reader)

    @cached
    def special_tokens(self) -> SpecialTokens:
        """Ids of the tokens that begin, end and pad a text, and the chat template, where the tokenizer's files say."""
        return SpecialTokens.of(self.tokenizer_files, self.tokenizer)

    @property
    def annotated(self) -> AnnotatedCorpus:
        """The facts by which an annotation is recognised as one of this corpus."""
        return AnnotatedCorpus(corpus_path(self.name), self.name, self.fingerprint, len(self))

    def annotations(self) -> list[str]:
        """Ask the store for the names of the annotations beside the corpus, sorted."""
        return list_annotations(self._root, self.annotated)

    def annotation(self, name: str) -> NDArray[Any]:
        """Read an annotation: one bool, int or float for each row, [R].

        Raises:
            NotFound: there is no annotation of this name. SpecMismatch: it belongs to another corpus.
            CorruptSegment: stored bytes are damaged.
        """
        return read_annotation(self._root, self.annotated, name)

    def corrupt_objects(self) -> list[str]:
        """Read every object but those of annotations; one line for each that is not what was sealed."""
        return self._reader.corrupt_objects()

    def _spans(self, name: str, rows: Sequence[int]) -> list[NDArray[Any]]:
        """Read an array at the positions of rows in any order, of a store with all chunks at a time."""
        ranges, reader = self.row_ranges(rows).tolist(), self._reader
        if isinstance(reader, GroupReader):
            array = reader.array(name)
            return read_together([ReadRequest(array, start, stop) for start, stop in ranges])
        return [reader.read(name, start, stop) for start, stop in ranges]

    @cached
    def _key_index(self) -> KeyIndex | KeysInMemory:
        if isinstance(self._reader, GroupReader) and self._reader.has(SORTED_KEYS):
            return KeyIndex(self._reader, len(self))
        self._reader.expect(KEY_ORDER, (len(self),), ("int64",))
        order = self._reader.read_all(KEY_ORDER).astype(np.int64)
        if order.min() < 0 or order.max() >= len(self):
            raise CorruptSegment(f"{self._reader.path}/{KEY_ORDER} names rows outside 0 to {len(self)}")
        return KeysInMemory(self.row_keys(0, len(self)), order)

    def _runs_of_full_rows(self) -> NDArray[np.int64]:
        cuts = [np.zeros(1, np.int64)]
        for start in range(0, len(self), _SCANNED_ROWS):
            stop = min(start + _SCANNED_ROWS, len(self))
            cuts.append(start + 1 + np.flatnonzero(np.diff(self.starts(start, stop)) < self.spec.row_tokens))
        # The last row ends a document whatever its length.
        return np.unique(np.concatenate([*cuts, np.array([len(self)])]))

    def _axis(self, name: str, count: int, end: int) -> NDArray[np.int64]:
        self._reader.expect(name, (count + 1,), ("int64",))
        axis = self._reader.read_all(name).astype(np.int64)
        if axis[0] != 0 or axis[-1] != end or (np.diff(axis) < 1).any():
            raise FormatError(f"{self._reader.path}/{name} does not rise from 0 to {end}")
        return axis


def _row_numbers(rows: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Row numbers [N] as int64; refused are masks and fractions, which would silently become other rows.

    Raises:
        InvalidInput: they are not whole numbers.
    """
    wanted = np.asarray(rows)
    if not len(wanted):
        return np.empty(0, np.int64)
    # In a list of whole numbers numpy turns True into 1, so the dtype does not show it.
    mixed = not isinstance(rows, np.ndarray) and not {bool, np.bool_}.isdisjoint(map(type, rows))
    if wanted.dtype == np.bool_ or mixed:
        raise InvalidInput("rows hold True or False, not row numbers; take np.flatnonzero(mask) of a mask")
    if not np.issubdtype(wanted.dtype, np.integer):
        raise InvalidInput(f"rows are {wanted.dtype}, like {wanted.ravel()[:3].tolist()!s:.60}; give whole numbers")
    return wanted.astype(np.int64, copy=False)
