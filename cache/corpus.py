"""A corpus: sealed rows of tokens with one tokenizer, on a flat token axis without holes.

On disk `corpora/<name>/` is a Zarr group whose attributes are the seal, created if absent and last; the
arrays are in the child group that the seal names. `cache/FORMAT.md` has the layout.

Shape legend:  P positions, R rows, S shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cache.errors import FormatError, InvalidInput, UnknownCorpus
from cache.groups import GroupReader, objects_from_json, objects_to_json
from cache.record import group_metadata, read_group_metadata
from cache.store import Root, StoredObject, check_name
from cache.types import JSON, Tokens

KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file that was ingested."""

    name: str
    sha256: str
    documents: int

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        return {"name": self.name, "sha256": self.sha256, "documents": self.documents}


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpec:
    """What the seal of a corpus says."""

    data: str
    """Name of the child group that holds the arrays."""
    fingerprint: str
    """sha256 of the content: tokenizer, tokens, rows and shards."""
    tokenizer_sha256: str
    vocab_size: int
    num_rows: int
    num_positions: int
    num_shards: int
    longest_row: int
    max_token_id: int
    row_tokens: int
    duplicate_rows: int
    """Rows whose key an earlier row already has."""
    sources: tuple[Source, ...]
    objects: tuple[StoredObject, ...]


def corpus_path(name: str) -> str:
    """Where a corpus lives below the root."""
    return f"corpora/{check_name('corpus', name)}"


def row_key(tokenizer_sha256: str, row: Tokens) -> bytes:
    """The 16-byte key of a row: a hash of its tokenizer and its token ids."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(bytes.fromhex(tokenizer_sha256))
    digest.update(row.astype("<u4").tobytes())
    return digest.digest()


class Corpus:
    """Read a sealed corpus: `len(corpus)` rows, `corpus.row(i)` their tokens."""

    def __init__(self, name: str, spec: CorpusSpec, reader: GroupReader) -> None:
        self.name = name
        self.spec = spec
        self._reader = reader

    @classmethod
    def open(cls, root: Root, name: str) -> Corpus:
        """Open by name.

        Raises:
            UnknownCorpus: no sealed corpus under that name. FormatError: a seal this version cannot read.
        """
        path = corpus_path(name)
        seal = read_group_metadata(root, path, "corpus")
        if seal is None:
            known = ", ".join(list_corpora(root)) or "none"
            raise UnknownCorpus(f"no corpus {name!r} in {root.url}; there are: {known}")
        spec = _spec_from_json(path, seal)
        return cls(name, spec, GroupReader(root, f"{path}/{spec.data}", spec.objects))

    def __len__(self) -> int:
        return self.spec.num_rows

    @property
    def num_positions(self) -> int:
        """P."""
        return self.spec.num_positions

    @property
    def num_shards(self) -> int:
        """S."""
        return self.spec.num_shards

    @property
    def tokenizer_sha256(self) -> str:
        """Fingerprint of the tokenizer (`cache.tokenizer.fingerprint`)."""
        return self.spec.tokenizer_sha256

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id."""
        return self.spec.vocab_size

    @property
    def fingerprint(self) -> str:
        """sha256 of the content, in hex."""
        return self.spec.fingerprint

    @cached_property
    def row_starts(self) -> NDArray[np.int64]:
        """[R+1] position at which each row starts, and the end."""
        return self._axis("row_starts", self.spec.num_rows, self.spec.num_positions)

    @cached_property
    def shard_rows(self) -> NDArray[np.int64]:
        """[S+1] row at which each shard starts, and the end."""
        return self._axis("shard_rows", self.spec.num_shards, self.spec.num_rows)

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """[S+1] position at which each shard starts, and the end."""
        return self.row_starts[self.shard_rows]

    def row(self, index: int) -> Tokens:
        """The tokens of one row, [T]."""
        return self.rows(index, index + 1)[0]

    def rows(self, start: int, stop: int) -> list[Tokens]:
        """The tokens of rows `start` to `stop`.

        Raises:
            InvalidInput: a range outside the corpus.
        """
        if not 0 <= start <= stop <= len(self):
            raise InvalidInput(f"rows {start} to {stop} are outside corpus {self.name!r} of {len(self)} rows")
        starts = self.row_starts[start : stop + 1]
        flat = self.tokens(int(starts[0]), int(starts[-1]))
        return [flat[a - starts[0] : b - starts[0]] for a, b in pairwise(starts)]

    def tokens(self, start: int, stop: int) -> Tokens:
        """The tokens at positions `start` to `stop`, [stop - start]."""
        self._reader.expect("tokens", (self.num_positions,), ("uint32",))
        return self._reader.read("tokens", start, stop).astype(np.uint32, copy=False)

    def row_keys(self, start: int, stop: int) -> NDArray[np.uint8]:
        """[stop - start, 16] keys of rows."""
        self._reader.expect("row_keys", (len(self), KEY_BYTES), ("uint8",))
        return self._reader.read("row_keys", start, stop).astype(np.uint8, copy=False)

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """The first row with each key, or None. The sorted keys are held in memory, 24 bytes a row."""
        order, ordered = self._key_index
        if not len(ordered):
            return [None] * len(keys)
        wanted = np.frombuffer(b"".join(keys), dtype=f"S{KEY_BYTES}")
        places = np.searchsorted(ordered, wanted)
        inside = np.minimum(places, len(ordered) - 1)
        return [
            int(order[place]) if match else None for place, match in zip(inside, ordered[inside] == wanted, strict=True)
        ]

    def shard_of_row(self, row: int) -> int:
        """The shard a row belongs to."""
        return int(np.searchsorted(self.shard_rows, row, side="right")) - 1

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with, as it was kept beside the tokens."""
        return Tokenizer.from_str(self._reader.read_all("tokenizer_json").tobytes().decode())

    def corrupt_objects(self) -> list[str]:
        """One line per stored object that is not what was sealed."""
        return self._reader.corrupt_objects()

    @cached_property
    def _key_index(self) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
        self._reader.expect("key_order", (len(self),), ("int64",))
        order = self._reader.read_all("key_order").astype(np.int64)
        keys = np.ascontiguousarray(self.row_keys(0, len(self))).reshape(-1).view(f"S{KEY_BYTES}")
        return order, keys[order]

    def _axis(self, name: str, count: int, end: int) -> NDArray[np.int64]:
        self._reader.expect(name, (count + 1,), ("int64",))
        axis = self._reader.read_all(name).astype(np.int64)
        if axis[0] != 0 or axis[-1] != end or (np.diff(axis) < 1).any():
            raise FormatError(f"{self._reader.path}/{name} does not rise from 0 to {end}")
        return axis


def list_corpora(root: Root) -> list[str]:
    """Names of the sealed corpora."""
    return [name for name in root.folders("corpora") if root.get(f"corpora/{name}/zarr.json") is not None]


def seal_corpus(root: Root, name: str, spec: CorpusSpec) -> bool:
    """Make the corpus exist; False when another one was sealed under the name meanwhile."""
    record = {
        **{n: getattr(spec, n) for n in spec.__dataclass_fields__ if n not in {"sources", "objects"}},
        "sources": [source.to_json() for source in spec.sources],
        "objects": objects_to_json(spec.objects),
    }
    return root.create(f"{corpus_path(name)}/zarr.json", group_metadata("corpus", record))


def _spec_from_json(path: str, seal: dict[str, Any]) -> CorpusSpec:
    try:
        sources = tuple(Source(**source) for source in seal["sources"])
        values = {n: seal[n] for n in CorpusSpec.__dataclass_fields__ if n not in {"sources", "objects"}}
        objects = objects_from_json(seal["objects"])
        spec = CorpusSpec(**values, sources=sources, objects=objects)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}/zarr.json is not the seal of a corpus: {error!r}") from error
    counts = (spec.num_rows, spec.num_positions, spec.num_shards, spec.vocab_size, spec.longest_row)
    if not all(isinstance(n, int) and 0 < n < 2**62 for n in counts):
        raise FormatError(f"{path}/zarr.json has impossible counts: {json.dumps(counts)}")
    check_name("data group", str(spec.data))
    return spec
