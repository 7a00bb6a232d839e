"""Ingest: from text, or rows of token ids, to a sealed corpus.

Documents are tokenized in batches and cut into rows that never cross a document; rows that are token ids already
stay as they are. Rows are spooled to temporary files, so that memory stays flat, then written to a new Zarr group,
which the seal makes a corpus. When it fails or is stopped, nothing is sealed and what was written is removed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.corpus import Corpus, CorpusSpec, Source, corpus_path, seal_corpus
from potstill.cache.corpus.documents import SourceFile, documents, file_sha256, source_files
from potstill.cache.corpus.keys import KEY_BYTES, sort_file, write_key_index
from potstill.cache.corpus.spool import RowSpool
from potstill.cache.corpus.tokenization import encode_documents
from potstill.cache.corpus.tokenizer import MAX_TOKENIZER_BYTES, SEALED_NAME, fingerprint, num_ids
from potstill.cache.errors import AlreadyExists, InvalidInput, LimitExceeded
from potstill.cache.row_batches import row_batches
from potstill.cache.store import GroupWriter, Root, StoredObject
from potstill.cache.store.groups import Layout, attempt_name, removed_on_failure
from potstill.cache.types import Tokens

_PROGRESS_ROWS = 1024
_TOKEN_CHUNK = 1 << 16
_ROW_CHUNK = 4096
# Elements of one object: 256 MiB of tokens before compression, 16 MiB of row starts.
_OBJECT_TOKENS = 1 << 26
_OBJECT_ROWS = 1 << 21
# Largest row or shard: more than any machine holds, and small enough that no sum with a position overflows int64.
_MOST = 1 << 40


LEAST_SHARD_POSITIONS = 4096
MOST_SHARD_POSITIONS = 1 << 20
"""Bounds of the shards that are made where nobody says how large."""
_FITTING_SHARDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestPlan:
    """Sizes of rows and shards, and where the text is.

    Raises:
        InvalidInput: a size is below 1. LimitExceeded: a size is over 2**40.
    """

    row_tokens: int = 512
    """Longest row, in tokens."""
    shard_positions: int | None = None
    """Most positions of a shard, the unit of work and of commit; a row that is longer gets a shard of its own. None
    for `fitting_shard_positions`."""
    text_field: str = "text"
    """Key or column of JSONL and Parquet records."""

    def __post_init__(self) -> None:
        for name in ("row_tokens", "shard_positions"):
            option, size = f"--{name.replace('_', '-')}", getattr(self, name)
            if size is None:
                continue
            if size < 1:
                raise InvalidInput(f"{option} is {size}; it must be at least 1")
            if size > _MOST:
                raise LimitExceeded(f"{option} is {size}; it must be at most {_MOST}")


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """Progress of an ingest: files read, of how many, and tokens so far."""

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
    """Make the corpus `name` from files and folders of text, and return it.

    Raises:
        AlreadyExists: the name is taken. InvalidInput: a source is bad, or there is no token in all of them.
        StoreError: the store is full or cannot be written; nothing is left behind.
    """
    # Asked first to save hours of work; creating the seal is what decides.
    _require_free(root, name)
    files = source_files(sources)
    tokenizer = _plain_tokenizer(tokenizer)

    def fill(spool: RowSpool) -> tuple[Source, ...]:
        return tuple(_ingest_files(files, tokenizer, plan, spool, on_progress))

    return _make_corpus(root, name, tokenizer, plan, fill, what=", ".join(map(str, sources)))


def ingest_rows(
    root: Root,
    name: str,
    rows: Iterable[Tokens],
    tokenizer: Tokenizer,
    plan: IngestPlan,
    *,
    sources: tuple[Source, ...] = (),
    on_progress: Callable[[IngestProgress], None] = lambda _: None,
) -> Corpus:
    """Make the corpus `name` from rows of token ids, which are kept whole, and return it.

    The arrays must not be changed after they were yielded. `sources` says where they come from.

    Raises:
        AlreadyExists: the name is taken. InvalidInput: there is no row; a row is empty or longer than
            `plan.row_tokens`, or has an id that the tokenizer does not have.
        StoreError: the store is full or cannot be written; nothing is left behind.
    """
    _require_free(root, name)

    def fill(spool: RowSpool) -> tuple[Source, ...]:
        tokens = 0
        for count, row in enumerate(rows, start=1):
            spool.add(row)
            tokens += len(row)
            if count % _PROGRESS_ROWS == 0:
                on_progress(IngestProgress(0, len(sources), tokens))
        return sources

    return _make_corpus(root, name, _plain_tokenizer(tokenizer), plan, fill, what="the rows")


def cut(blocks: Iterable[Tokens], row_tokens: int) -> Iterator[Tokens]:
    """Cut a document, given as blocks of token ids, into rows of `row_tokens` tokens; only the last may be shorter."""
    rest = np.empty(0, dtype=np.uint32)
    for block in blocks:
        tokens = np.concatenate([rest, block])
        whole = len(tokens) - len(tokens) % row_tokens
        for start in range(0, whole, row_tokens):
            yield tokens[start : start + row_tokens]
        rest = tokens[whole:]
    if len(rest):
        yield rest


def fitting_shard_positions(num_positions: int) -> int:
    """Positions of a shard by which a corpus of `num_positions` has 64 of them, or as near as the bounds allow.

    A fill that is stopped loses the shards in work. Few positions a shard cost space instead: each is a dozen objects.
    """
    return min(MOST_SHARD_POSITIONS, max(LEAST_SHARD_POSITIONS, -(-num_positions // _FITTING_SHARDS)))


def shard_bounds(row_starts: NDArray[np.int64], shard_positions: int) -> NDArray[np.int64]:
    """First row [S+1] int64 of each shard, then R. A shard has at most `shard_positions`, or one longer row."""
    return np.array([0, *(stop for _, stop in row_batches(row_starts, shard_positions))], dtype=np.int64)


def _require_free(root: Root, name: str) -> None:
    if root.get(f"{corpus_path(name)}/zarr.json") is not None:
        raise _taken(root, name)


def _taken(root: Root, name: str) -> AlreadyExists:
    return AlreadyExists(
        f"corpus {name!r} is sealed in {root.url}; use it if it is of the same text, else take another name"
    )


def _make_corpus(
    root: Root,
    name: str,
    tokenizer: Tokenizer,
    plan: IngestPlan,
    fill: Callable[[RowSpool], tuple[Source, ...]],
    *,
    what: str,
) -> Corpus:
    """Write the rows that `fill` spools to a new group, and seal it; `what` names their source in errors."""
    vocab_size = num_ids(tokenizer)
    with tempfile.TemporaryDirectory(prefix="potstill-ingest-") as folder:
        spool = RowSpool(Path(folder), fingerprint(tokenizer), vocab_size, plan.row_tokens)
        with spool:
            sources = fill(spool)
        if not spool.num_rows:
            raise InvalidInput(f"there is no token in {what}; a corpus cannot be empty")
        group = f"{corpus_path(name)}/{attempt_name('data')}"
        with removed_on_failure(root, group):
            spec = _write(root, group, spool, tokenizer, sources, plan)
        # From here on the seal may name the group, also when sealing raises: it is not ours to delete.
        if not seal_corpus(root, name, spec):
            root.delete(group)
            raise _taken(root, name)
    return Corpus.open(root, name)


def _ingest_files(
    files: list[SourceFile],
    tokenizer: Tokenizer,
    plan: IngestPlan,
    spool: RowSpool,
    on_progress: Callable[[IngestProgress], None],
) -> Iterator[Source]:
    rows = tokens = 0
    for number, file in enumerate(files):
        count = 0
        for blocks in encode_documents(tokenizer, documents(file.path, plan.text_field), str(file.path)):
            count += 1
            for row in cut(blocks, plan.row_tokens):
                spool.add(row)
                rows, tokens = rows + 1, tokens + len(row)
                if rows % _PROGRESS_ROWS == 0:
                    on_progress(IngestProgress(number, len(files), tokens))
        yield Source(name=file.name, sha256=file_sha256(file.path), documents=count)
        on_progress(IngestProgress(number + 1, len(files), tokens))


def _write(
    root: Root, group: str, spool: RowSpool, tokenizer: Tokenizer, sources: tuple[Source, ...], plan: IngestPlan
) -> CorpusSpec:
    row_starts = spool.row_starts()
    size = plan.shard_positions or fitting_shard_positions(spool.num_positions)
    shard_rows = shard_bounds(row_starts, size)
    writer = GroupWriter(root, group)
    digest = hashlib.sha256(bytes.fromhex(spool.tokenizer_sha256))
    _stream(writer, "tokens", spool.token_blocks, (spool.num_positions,), np.uint32, digest)
    _stream(writer, "row_starts", spool.start_blocks, (spool.num_rows + 1,), np.int64, digest)
    digest.update(shard_rows.astype("<i8").tobytes())
    _stream(writer, "row_keys", spool.key_blocks, (spool.num_rows, KEY_BYTES), np.uint8)
    duplicates = write_key_index(writer, sort_file(spool.key_path))
    objects = _write_small(writer, shard_rows, row_starts[shard_rows], tokenizer)
    return CorpusSpec(
        data=group.rsplit("/", 1)[-1],
        fingerprint=digest.hexdigest(),
        tokenizer_sha256=spool.tokenizer_sha256,
        vocab_size=spool.vocab_size,
        num_rows=spool.num_rows,
        num_positions=spool.num_positions,
        num_shards=len(shard_rows) - 1,
        longest_row=spool.longest_row,
        max_token_id=spool.max_token_id,
        row_tokens=plan.row_tokens,
        duplicate_rows=duplicates,
        sources=sources,
        objects=objects,
    )


def _stream(
    writer: GroupWriter,
    name: str,
    blocks: Callable[[int], Iterator[NDArray[Any]]],
    shape: tuple[int, ...],
    dtype: type[np.generic],
    digest: hashlib._Hash | None = None,
) -> None:
    """Write an array object by object; `digest`, if any, takes its content into the corpus' fingerprint."""
    chunk, most = (_TOKEN_CHUNK, _OBJECT_TOKENS) if name == "tokens" else (_ROW_CHUNK, _OBJECT_ROWS)
    size = min(most, shape[0])
    array = writer.array(name, shape, dtype, Layout((chunk, *shape[1:]), size))
    for number, block in enumerate(blocks(size)):
        if digest is not None:
            # Little-endian on every machine, so that the same content has the same fingerprint.
            digest.update(block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes())
        writer.put(array, number * size, block)


def _write_small(
    writer: GroupWriter, shard_rows: NDArray[np.int64], shard_starts: NDArray[np.int64], tokenizer: Tokenizer
) -> tuple[StoredObject, ...]:
    writer.write("shard_rows", shard_rows, Layout((_TOKEN_CHUNK,)))
    writer.write("shard_starts", shard_starts, Layout((_TOKEN_CHUNK,)))
    text = np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8)
    writer.write(SEALED_NAME, text, Layout((1 << 20,)))
    return writer.finish()


def _plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer, without the truncation and padding that its file may ask for.

    Raises:
        InvalidInput: it is larger than what a corpus keeps.
    """
    text = tokenizer.to_str()
    size = len(text.encode())
    if size > MAX_TOKENIZER_BYTES:
        raise InvalidInput(
            f"the tokenizer has {size} bytes as JSON, and a corpus keeps at most {MAX_TOKENIZER_BYTES}; "
            "take out what is no part of its vocabulary"
        )
    plain = Tokenizer.from_str(text)
    plain.no_truncation()
    plain.no_padding()
    return plain
