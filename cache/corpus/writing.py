"""Writing of spooled rows as the arrays of a new corpus, object by object, so that memory stays flat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.keys import KEY_BYTES, sort_file, write_key_index
from potstill.cache.corpus.seal import CorpusSpec, Source
from potstill.cache.corpus.spool import RowSpool
from potstill.cache.corpus.tokenizer import SEALED_NAME
from potstill.cache.corpus.tokenizer_files import SEALED_FILES, sealed_bytes
from potstill.cache.row_batches import row_batches
from potstill.cache.store import GroupWriter, StoredObject
from potstill.cache.store.new_arrays import Layout

_TOKEN_CHUNK = 1 << 16
_ROW_CHUNK = 4096
# Elements of one object: 256 MiB of tokens before compression, 16 MiB of row starts.
_OBJECT_TOKENS = 1 << 26
_OBJECT_ROWS = 1 << 21

LEAST_SHARD_POSITIONS = 4096
MOST_SHARD_POSITIONS = 1 << 20
"""Bounds of the shards that are made where nobody says how large."""
_FITTING_SHARDS = 64


def write_corpus(
    writer: GroupWriter,
    spool: RowSpool,
    tokenizer: Tokenizer,
    sources: tuple[Source, ...],
    *,
    tokenizer_files: Mapping[str, str],
    shard_positions: int | None = None,
) -> CorpusSpec:
    """Write the arrays of a corpus, and return what its seal says. None for `fitting_shard_positions`.

    Raises:
        StoreError: the store is full or cannot be written.
    """
    row_starts = spool.row_starts()
    shard_rows = shard_bounds(row_starts, shard_positions or fitting_shard_positions(spool.num_positions))
    digest = hashlib.sha256(bytes.fromhex(spool.tokenizer_sha256))
    _stream(writer, "tokens", spool.token_blocks, (spool.num_positions,), np.uint32, digest)
    _stream(writer, "row_starts", spool.start_blocks, (spool.num_rows + 1,), np.int64, digest)
    digest.update(shard_rows.astype("<i8").tobytes())
    _stream(writer, "row_keys", spool.key_blocks, (spool.num_rows, KEY_BYTES), np.uint8)
    _write_documents(writer, spool, digest)
    duplicates = write_key_index(writer, sort_file(spool.key_path))
    if tokenizer_files:
        writer.write(SEALED_FILES, sealed_bytes(tokenizer_files), Layout((1 << 20,)))
    objects = _write_small(writer, shard_rows, row_starts[shard_rows], tokenizer)
    return CorpusSpec(
        data=writer.path.rsplit("/", 1)[-1],
        fingerprint=digest.hexdigest(),
        tokenizer_sha256=spool.tokenizer_sha256,
        vocab_size=spool.vocab_size,
        num_rows=spool.num_rows,
        num_positions=spool.num_positions,
        num_shards=len(shard_rows) - 1,
        longest_row=spool.longest_row,
        max_token_id=spool.max_token_id,
        row_tokens=spool.row_tokens,
        duplicate_rows=duplicates,
        sources=sources,
        objects=objects,
        num_documents=spool.num_documents or None,
        num_taught=spool.num_positions - spool.num_untaught if spool.num_untaught else None,
    )


def _write_documents(writer: GroupWriter, spool: RowSpool, digest: hashlib._Hash) -> None:
    """Write which rows are of which document, and which targets are to be learnt, where there is anything to say."""
    # With its name, so that neither can be taken for the other, or for more shards.
    if spool.num_documents:
        digest.update(b"document_rows")
        _stream(writer, "document_rows", spool.document_blocks, (spool.num_documents + 1,), np.int64, digest)
    if spool.num_untaught:
        digest.update(b"loss_mask")
        _stream(writer, "loss_mask", spool.loss_mask_blocks, (spool.num_positions,), np.bool_, digest)


def _stream(
    writer: GroupWriter,
    name: str,
    blocks: Callable[[int], Iterator[NDArray[Any]]],
    shape: tuple[int, ...],
    dtype: type[np.generic],
    digest: hashlib._Hash | None = None,
) -> None:
    """Write an array object by object; `digest`, if any, takes its content into the corpus' fingerprint."""
    of_positions = name in ("tokens", "loss_mask")
    chunk, most = (_TOKEN_CHUNK, _OBJECT_TOKENS) if of_positions else (_ROW_CHUNK, _OBJECT_ROWS)
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


def fitting_shard_positions(num_positions: int) -> int:
    """Positions of a shard by which a corpus of `num_positions` has 64 of them, or as near as the bounds allow.

    A fill that is stopped loses the shards in work. Few positions a shard cost space instead: each is a dozen objects.
    """
    return min(MOST_SHARD_POSITIONS, max(LEAST_SHARD_POSITIONS, -(-num_positions // _FITTING_SHARDS)))


def shard_bounds(row_starts: NDArray[np.int64], shard_positions: int) -> NDArray[np.int64]:
    """First row [S+1] int64 of each shard, then R. A shard has at most `shard_positions`, or one longer row."""
    return np.array([0, *(stop for _, stop in row_batches(row_starts, shard_positions))], dtype=np.int64)
