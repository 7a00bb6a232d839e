"""Text -> sealed corpus.

Documents are tokenized in batches, cut into rows that never cross a document, and spooled to temporary
files, so that memory stays flat; the spool is then written to a new Zarr group, and the seal makes it a corpus.
Stopped or failed, nothing is sealed and what was written is removed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cache.corpus import KEY_BYTES, Corpus, CorpusSpec, Source, corpus_path, row_key, seal_corpus
from cache.documents import SourceFile, documents, file_sha256, source_files
from cache.errors import AlreadyExists, InvalidInput
from cache.groups import GroupWriter, Layout, attempt_name
from cache.store import Root, StoredObject, store_errors
from cache.tokenizer import fingerprint
from cache.types import Tokens

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4 << 20
_CHUNK = 1 << 16
# Elements of one object: 256 MiB of tokens before compression.
_OBJECT_ROWS = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestPlan:
    """How text becomes rows and shards.

    Raises:
        InvalidInput: a size below 1.
    """

    row_tokens: int = 512
    """Longest row, in tokens."""
    shard_positions: int = 1 << 20
    """A shard is closed before the row that would take it over this; the unit of work and of commit."""
    text_field: str = "text"
    """Key or column of JSONL and Parquet records."""

    def __post_init__(self) -> None:
        for name in ("row_tokens", "shard_positions"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """How far an ingest is: files read, tokens so far."""

    files_done: int
    files: int
    tokens: int


def ingest(
    root: Root,
    name: str,
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    plan: IngestPlan,
    *,
    on_progress: Callable[[IngestProgress], None] = lambda _: None,
) -> Corpus:
    """Make the corpus `name` of `sources` and return it.

    Raises:
        AlreadyExists: the name is taken. InvalidInput: a bad source, or no token in all of them.
        StoreError: the store is full or cannot be written; nothing is left behind.
    """
    path = corpus_path(name)
    taken = AlreadyExists(f"corpus {name!r} is sealed in {root.url}; ingest under another name")
    if root.get(f"{path}/zarr.json") is not None:
        raise taken
    files = source_files(sources)
    tokenizer = _plain_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory(prefix="potstill-ingest-") as folder:
        spool = _Spool(Path(folder), fingerprint(tokenizer))
        with spool, store_errors(f"temporary files in {folder}"):
            recorded = tuple(_ingest_files(files, tokenizer, plan, spool, on_progress))
        if not spool.num_rows:
            raise InvalidInput(f"there is no token in {', '.join(map(str, sources))}; a corpus cannot be empty")
        group = f"{path}/{attempt_name('data')}"
        try:
            spec = _write(root, group, spool, tokenizer, recorded, plan)
        except BaseException:
            root.delete(group)
            raise
        # From here on the seal may name the group, also when sealing raises: it is not ours to delete.
        if not seal_corpus(root, name, spec):
            root.delete(group)
            raise taken
    return Corpus.open(root, name)


def cut(tokens: Tokens, row_tokens: int) -> Iterator[Tokens]:
    """Rows of at most `row_tokens` tokens; only the last of a document is shorter."""
    for start in range(0, len(tokens), row_tokens):
        yield tokens[start : start + row_tokens]


def shard_bounds(row_starts: NDArray[np.int64], shard_positions: int) -> NDArray[np.int64]:
    """[S+1] first row of each shard: whole rows, at most `shard_positions` unless one row alone is longer."""
    bounds = [0]
    num_rows = len(row_starts) - 1
    while bounds[-1] < num_rows:
        limit = row_starts[bounds[-1]] + shard_positions
        fitting = int(np.searchsorted(row_starts, limit, side="right")) - 1
        bounds.append(max(fitting, bounds[-1] + 1))
    return np.array(bounds, dtype=np.int64)


class _Spool:
    """Rows on their way to disk: flat tokens, row lengths and keys in three temporary files."""

    def __init__(self, folder: Path, tokenizer_sha256: str) -> None:
        self.tokenizer_sha256 = tokenizer_sha256
        self.num_rows = 0
        self.num_positions = 0
        self._paths = {name: folder / name for name in ("tokens", "lengths", "keys")}
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> None:
        self._files = {name: path.open("wb") for name, path in self._paths.items()}

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, row: Tokens) -> None:
        """Keep one row."""
        self._files["tokens"].write(row.tobytes())
        self._files["lengths"].write(len(row).to_bytes(8, "little"))
        self._files["keys"].write(row_key(self.tokenizer_sha256, row))
        self.num_rows += 1
        self.num_positions += len(row)

    def tokens(self) -> NDArray[np.uint32]:
        """[P], mapped, not read."""
        return np.memmap(self._paths["tokens"], dtype=np.uint32, mode="r")

    def row_starts(self) -> NDArray[np.int64]:
        """[R+1]."""
        lengths = np.fromfile(self._paths["lengths"], dtype=np.int64)
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def keys(self) -> NDArray[np.uint8]:
        """[R, 16]."""
        return np.fromfile(self._paths["keys"], dtype=np.uint8).reshape(-1, KEY_BYTES)


def _ingest_files(
    files: list[SourceFile],
    tokenizer: Tokenizer,
    plan: IngestPlan,
    spool: _Spool,
    on_progress: Callable[[IngestProgress], None],
) -> Iterator[Source]:
    for number, file in enumerate(files):
        count = 0
        for batch in _batches(documents(file.path, plan.text_field)):
            for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                for row in cut(np.array(encoded.ids, dtype=np.uint32), plan.row_tokens):
                    spool.add(row)
            count += len(batch)
            on_progress(IngestProgress(number, len(files), spool.num_positions))
        yield Source(name=file.name, sha256=file_sha256(file.path), documents=count)
        on_progress(IngestProgress(number + 1, len(files), spool.num_positions))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(
    root: Root, group: str, spool: _Spool, tokenizer: Tokenizer, sources: tuple[Source, ...], plan: IngestPlan
) -> CorpusSpec:
    row_starts, keys = spool.row_starts(), spool.keys()
    shard_rows = shard_bounds(row_starts, plan.shard_positions)
    order, duplicates = _key_order(keys)
    tokens = spool.tokens()
    # The vocabulary may have holes, so its size is one more than the largest id.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    objects = _write_arrays(root, group, tokens, row_starts, keys, order, shard_rows, tokenizer)
    return CorpusSpec(
        data=group.rsplit("/", 1)[-1],
        fingerprint=_content_hash(spool.tokenizer_sha256, tokens, row_starts, shard_rows),
        tokenizer_sha256=spool.tokenizer_sha256,
        vocab_size=vocab_size,
        num_rows=spool.num_rows,
        num_positions=spool.num_positions,
        num_shards=len(shard_rows) - 1,
        longest_row=int(np.diff(row_starts).max()),
        max_token_id=int(tokens.max()),
        row_tokens=plan.row_tokens,
        duplicate_rows=duplicates,
        sources=sources,
        objects=objects,
    )


def _write_arrays(
    root: Root,
    group: str,
    tokens: NDArray[np.uint32],
    row_starts: NDArray[np.int64],
    keys: NDArray[np.uint8],
    order: NDArray[np.int64],
    shard_rows: NDArray[np.int64],
    tokenizer: Tokenizer,
) -> tuple[StoredObject, ...]:
    writer = GroupWriter(root, group)
    array = writer.array("tokens", tokens.shape, np.uint32, Layout((_CHUNK,), min(_OBJECT_ROWS, len(tokens))))
    for start in range(0, len(tokens), _OBJECT_ROWS):
        writer.put(array, start, np.asarray(tokens[start : start + _OBJECT_ROWS]))
    writer.write("row_starts", row_starts, Layout((_CHUNK,)))
    writer.write("row_keys", keys, Layout((_CHUNK, KEY_BYTES)))
    writer.write("key_order", order, Layout((_CHUNK,)))
    writer.write("shard_rows", shard_rows, Layout((_CHUNK,)))
    text = np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8)
    writer.write("tokenizer_json", text, Layout((1 << 20,)))
    return writer.finish()


def _key_order(keys: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int]:
    """Row numbers by rising key, the earliest of equal ones first; how many rows repeat an earlier key."""
    flat = np.ascontiguousarray(keys).reshape(-1).view(f"S{KEY_BYTES}")
    order = np.argsort(flat, kind="stable").astype(np.int64)
    ordered = flat[order]
    return order, int((ordered[1:] == ordered[:-1]).sum())


def _content_hash(
    tokenizer_sha256: str,
    tokens: NDArray[np.uint32],
    row_starts: NDArray[np.int64],
    shard_rows: NDArray[np.int64],
) -> str:
    digest = hashlib.sha256(bytes.fromhex(tokenizer_sha256))
    for start in range(0, len(tokens), _OBJECT_ROWS):
        digest.update(tokens[start : start + _OBJECT_ROWS].astype("<u4").tobytes())
    for axis in (row_starts, shard_rows):
        digest.update(axis.astype("<i8").tobytes())
    return digest.hexdigest()


def _plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation or padding, which its file may have asked for."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain
