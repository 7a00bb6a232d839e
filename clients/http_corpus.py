"""A corpus behind a service: `potstill.cache.corpus.corpus.Corpus` without its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.keys import KEY_BYTES
from potstill.cache.corpus.seal import CorpusSpec
from potstill.cache.corpus.tokenizer_files import MAX_SEALED_BYTES, SEALED_FILES, parse_tokenizer_files
from potstill.cache.errors import FormatError, SpecMismatch, TeacherFailed, UnsupportedField
from potstill.cache.forks import cached
from potstill.cache.types import Tokens
from potstill.cache.wire import StreamHead
from potstill.cache.wire.stream import write_row_numbers
from potstill.clients.answers import described_corpus
from potstill.clients.retry import Tries
from potstill.clients.sync_connection import BLOCK_BYTES, SyncConnection

# Bounds of one request: a read that is broken off is asked for again from there, and a service serves many.
_REQUEST_ELEMENTS = 1 << 22
_REQUEST_ROWS = 1024
_REQUEST_POSITIONS = 1 << 20
_TOKENIZER_BYTES = 1 << 28
# Row starts are asked for again and again, a few at a time, so they are fetched in pages and kept: 32 KiB each.
_PAGE = 4096
_PAGES = 256
Check: TypeAlias = Callable[[NDArray[Any], str], None]
"""Raises for a part that an array cannot have; it is given the part, and where it is from."""


def corpus_route(name: str) -> str:
    """The route of a corpus, whatever characters its name has."""
    return f"/v1/corpora/{quote(name, safe='')}"


class HttpCorpus(Corpus):
    """Reads a sealed corpus over HTTP by the methods of `Corpus`; only rows cannot be looked up by their key."""

    def __init__(self, connection: SyncConnection, name: str) -> None:
        """Fetch the corpus's seal.

        Raises:
            UnknownCorpus: the service has none of this name. TeacherFailed: it answers nonsense.
        """
        self._connection = connection
        self._description = connection.json(corpus_route(name))
        self.name = name
        self.spec = described_corpus(self._description, connection.url)
        self._reader = _HttpArrays(connection, name, self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address, which is asked again."""
        return type(self), (self._connection, self.name)

    @cached
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was made with."""
        return Tokenizer.from_str(self._connection.text(f"{corpus_route(self.name)}/tokenizer", _TOKENIZER_BYTES))

    @cached
    def tokenizer_files(self) -> dict[str, str]:
        """Texts of the files beside the tokenizer, by name; none of a service of before, which has no such route.

        Raises:
            TeacherFailed: the service answers nonsense. PotstillError: as `SyncConnection.json`.
        """
        if not self._description.get("tokenizer_files"):
            return {}
        route = f"{corpus_route(self.name)}/{SEALED_FILES}"
        try:
            return parse_tokenizer_files(
                self._connection.text(route, MAX_SEALED_BYTES), f"{self._connection.url}{route}"
            )
        except FormatError as error:
            raise TeacherFailed(error.detail) from error

    def take(self, rows: Sequence[int]) -> list[Tokens]:
        """Read the tokens of rows in any order; raises as `Corpus.take` and `SyncConnection.json` do."""
        return self._take(rows, "rows", partial(_check_tokens, vocab_size=self.spec.vocab_size))

    def take_loss_mask(self, rows: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Read the loss mask of rows in any order, each [T] bool; raises as `take` does."""
        if not self.has_loss_mask:
            return super().take_loss_mask(rows)
        return self._take(rows, "loss_mask", partial(_check_kind, dtype="bool"))

    def annotations(self) -> list[str]:
        """Fetch the names of the annotations that lie beside the corpus right now."""
        return [str(name) for name in self._connection.json(corpus_route(self.name)).get("annotations", [])]

    def annotation(self, name: str) -> NDArray[Any]:
        """Read an annotation, [R] one value of each row; raises as `Corpus.annotation` and `SyncConnection.json` do."""
        route = f"{corpus_route(self.name)}/annotations/{quote(name, safe='')}"
        return read_array(self._connection, route, 0, len(self), self.fingerprint, _check_annotation)

    def corrupt_objects(self) -> list[str]:
        """Raise UnsupportedField: only the machine that has the files can check them."""
        raise UnsupportedField(f"corpus {self.name!r} is behind {self._connection.url}; run `potstill verify` there")

    def _take(self, rows: Sequence[int], of: str, check: Check) -> list[NDArray[Any]]:
        most = max(1, min(_REQUEST_ROWS, _REQUEST_POSITIONS // self.spec.longest_row))
        read = self._connection.parts(lambda at, tries: self._rows(rows[at : at + most], tries, of, check), len(rows))
        return list(read) if len(rows) else []

    def _rows(self, rows: Sequence[int], tries: Tries, of: str, check: Check) -> Iterator[NDArray[Any]]:
        lengths = np.diff(self.row_ranges(rows), axis=1)[:, 0].tolist()
        route, body = f"{corpus_route(self.name)}/{of}", write_row_numbers(rows)
        where, most_bytes = f"{self._connection.url}{route}", max(BLOCK_BYTES, 8 * max(lengths))
        with self._connection.stream(route, tries=tries, body=body, most_bytes=most_bytes) as reader:
            require_corpus(reader.head, self.fingerprint, self._connection.url)
            if reader.head.batches != len(rows):
                raise TeacherFailed(f"{where} promised {reader.head.batches} rows for {len(rows)}")
            for length, values in zip(lengths, reader.array(), strict=True):
                if values.shape != (length,):
                    raise TeacherFailed(f"{where} gave values of shape {values.shape} for a row of {length}")
                check(values, where)
                yield values


class _HttpArrays:
    """The arrays of a corpus behind a service (`potstill.cache.corpus.corpus.CorpusArrays`)."""

    def __init__(self, connection: SyncConnection, name: str, spec: CorpusSpec) -> None:
        self.path = f"{connection.url}{corpus_route(name)}"
        self._connection = connection
        self._route = corpus_route(name)
        self._spec = spec
        self._lengths = {
            "tokens": spec.num_positions,
            "row_starts": spec.num_rows + 1,
            "row_keys": spec.num_rows,
            "shard_rows": spec.num_shards + 1,
            "shard_starts": spec.num_shards + 1,
        }
        if spec.num_documents is not None:
            self._lengths["document_rows"] = spec.num_documents + 1
        if spec.num_taught is not None:
            self._lengths["loss_mask"] = spec.num_positions
        # Two threads may fetch one page twice, but none waits for the other's network.
        self._page = lru_cache(_PAGES)(self._read_page)

    def has(self, name: str) -> bool:
        return name in self._lengths

    def expect(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> str:
        if name not in self._lengths:
            raise UnsupportedField(f"{self.path} does not give {name!r}: rows are not looked up by key over HTTP")
        assert shape[0] == self._lengths[name], "the corpus and its arrays have one spec"
        return next(iter(dtypes))

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        # Like a slice of an array, a range may go over its end.
        stop = min(stop, self._lengths[name])
        if name != "row_starts":
            return self._fetch(name, name, start, stop)
        pages = [self._page(page) for page in range(start // _PAGE, -(-stop // _PAGE))]
        first = start // _PAGE * _PAGE
        starts: NDArray[Any] = np.concatenate(pages)[start - first : stop - first]
        return starts

    def read_all(self, name: str) -> NDArray[Any]:
        return self.read(name, 0, self._lengths[name])

    def corrupt_objects(self) -> list[str]:
        return []

    def _check(self, name: str) -> Check:
        if name == "tokens":
            return partial(_check_tokens, vocab_size=self._spec.vocab_size)
        if name == "row_keys":
            return partial(_check_kind, dtype="uint8", width=(KEY_BYTES,))
        return partial(_check_kind, dtype="bool" if name == "loss_mask" else "int64")

    def _read_page(self, page: int) -> NDArray[Any]:
        return self._fetch("row_starts", "rows", page * _PAGE, min((page + 1) * _PAGE, self._lengths["row_starts"]))

    def _fetch(self, name: str, route: str, start: int, stop: int) -> NDArray[Any]:
        return read_array(
            self._connection, f"{self._route}/{route}", start, stop, self._spec.fingerprint, self._check(name)
        )


def read_array(
    connection: SyncConnection,
    route: str,
    start: int,
    stop: int,
    fingerprint: str,
    check: Check,
) -> NDArray[Any]:
    """Read elements `start` to `stop` of one of a corpus's arrays, in several requests where there are many.

    `check` raises for a part that the array cannot have; it is given the part, and where it is from.

    Raises:
        SpecMismatch: the service has another corpus under the name now. PotstillError: as `SyncConnection.json`.
    """

    def read(at: int, tries: Tries) -> Iterator[NDArray[Any]]:
        first, end = start + at, min(stop, start + at + _REQUEST_ELEMENTS)
        with connection.stream(route, tries=tries, params={"start": first, "stop": end}) as reader:
            require_corpus(reader.head, fingerprint, connection.url)
            if reader.head.length != end - first:
                raise TeacherFailed(f"{connection.url}{route} has {reader.head.length} elements for {first} to {end}")
            for part in reader.array():
                check(part, f"{connection.url}{route}")
                yield part

    parts = list(connection.parts(read, stop - start, len))
    if not parts:
        raise TeacherFailed(f"{connection.url}{route} gave nothing at all for {start} to {stop}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def require_corpus(head: StreamHead, fingerprint: str, url: str) -> None:
    """Check that an answer is of the corpus that was opened: a name may have been given to another one since.

    Raises:
        SpecMismatch: it is of another corpus.
    """
    if head.corpus != fingerprint:
        raise SpecMismatch(
            f"{url} has another corpus under this name now: fingerprint {head.corpus[:12]}, not {fingerprint[:12]}"
        )


def _check_tokens(part: NDArray[Any], where: str, *, vocab_size: int) -> None:
    _check_kind(part, where, dtype="uint32")
    if len(part) and int(part.max()) >= vocab_size:
        raise TeacherFailed(f"{where} gave the token id {int(part.max())}, the tokenizer has {vocab_size}")


def _check_annotation(part: NDArray[Any], where: str) -> None:
    if part.ndim != 1:
        raise TeacherFailed(f"{where} gave more than one value of a row")


def _check_kind(part: NDArray[Any], where: str, *, dtype: str, width: tuple[int, ...] = ()) -> None:
    if part.dtype != dtype or part.shape[1:] != width:
        raise TeacherFailed(f"{where} gave {part.dtype} of shape {part.shape}, not {dtype} of {(len(part), *width)}")
