"""A spool of rows on their way into a corpus: checked, hashed and appended to temporary files.

Memory stays flat, however many rows there are.

Shape legend:  P positions, R rows, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.keys import KEY_RECORD, key_records, row_keys
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.cache.store.root import store_errors
from potstill.cache.types import Tokens

# Rows are checked and written this many at a time: numpy's cost per call is spread over them.
_HELD_ROWS = 8192
_HELD_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row on its way into a corpus."""

    tokens: Tokens
    taught: NDArray[np.bool_] | None = None
    """Targets that are to be learnt, bool [T]; None for all."""
    ends_document: bool = False


class RowSpool:
    """Takes rows one by one and gives them back as arrays, in blocks.

    It is a context manager: `add` and `end_document` inside, read after. Rows have documents once one was ended.
    """

    def __init__(self, folder: Path, tokenizer_sha256: str, vocab_size: int, row_tokens: int) -> None:
        self.tokenizer_sha256 = tokenizer_sha256
        self.vocab_size = vocab_size
        self.row_tokens = row_tokens
        self.num_rows = 0
        self.num_positions = 0
        self.num_documents = 0
        """Number of documents with rows; 0 where none was ended."""
        self.num_untaught = 0
        """Number of targets that are not to be learnt."""
        self.longest_row = 0
        self.max_token_id = 0
        self.key_path = folder / "keys"
        """Temporary file of `KEY_RECORD`s, in the order of rows."""
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._held: list[Tokens] = []
        self._held_taught: list[NDArray[np.bool_] | None] = []
        self._held_tokens = 0
        self._document_end = 0
        self._held_ends: list[int] = []

    def __enter__(self) -> None:
        with self._store_errors():
            names = ("tokens", "starts", "keys", "documents", "untaught")
            self._files = {name: (self._folder / name).open("wb") for name in names}
            self._files["starts"].write(bytes(8))
            self._files["documents"].write(bytes(8))

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None:
                if self._document_end:
                    self.end_document()
                self._flush()
                with self._store_errors():
                    self._files["untaught"].truncate(self.num_positions)
        finally:
            with self._store_errors():
                for file in self._files.values():
                    file.close()

    def add(self, row: NDArray[Any], taught: NDArray[np.bool_] | None = None) -> None:
        """Keep one row of token ids, integers [T]. Rows are checked in batches, so an error may come rows later.

        Args:
            row: token ids, integers [T].
            taught: bool [T]; of target t, the distribution of the token after `row[t]`, whether it is to be learnt.
                None for all.

        Raises:
            InvalidInput: a row is empty, too long or not flat, or has an id that the tokenizer does not have; or
                `taught` is not of its length.
            StoreError: the disk with the temporary files is full.
        """
        self._held.append(row)
        self._held_taught.append(taught)
        self._held_tokens += row.size
        if len(self._held) >= _HELD_ROWS or self._held_tokens >= _HELD_TOKENS:
            self._flush()

    def end_document(self) -> None:
        """End the document of the rows that were added since the last one's end; without rows there is none."""
        end = self.num_rows + len(self._held)
        if end > self._document_end:
            self._document_end = end
            self._held_ends.append(end)

    def token_blocks(self, size: int) -> Iterator[NDArray[np.uint32]]:
        """The tokens of all rows, `size` at a time."""
        return self._blocks("tokens", np.dtype(np.uint32), self.num_positions, size)

    def start_blocks(self, size: int) -> Iterator[NDArray[np.int64]]:
        """The [R+1] positions at which rows start, and P, `size` at a time."""
        return self._blocks("starts", np.dtype(np.int64), self.num_rows + 1, size)

    def key_blocks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """The keys [R, 16] of all rows, `size` at a time."""
        for block in self._blocks("keys", KEY_RECORD, self.num_rows, size):
            yield np.ascontiguousarray(block["key"])

    def document_blocks(self, size: int) -> Iterator[NDArray[np.int64]]:
        """The [D+1] rows at which documents start, and R, `size` at a time."""
        return self._blocks("documents", np.dtype(np.int64), self.num_documents + 1, size)

    def loss_mask_blocks(self, size: int) -> Iterator[NDArray[np.bool_]]:
        """The loss mask [P] of all rows, `size` at a time."""
        for block in self._blocks("untaught", np.dtype(np.bool_), self.num_positions, size):
            yield ~block

    def row_starts(self) -> NDArray[np.int64]:
        """The [R+1] positions at which rows start, and P, memory-mapped: only what is used is read."""
        return np.memmap(self._folder / "starts", dtype=np.int64, mode="r")

    def _flush(self) -> None:
        rows, self._held, self._held_tokens = self._held, [], 0
        taught, self._held_taught = self._held_taught, []
        ends_of_documents, self._held_ends = self._held_ends, []
        with self._store_errors():
            self._files["documents"].write(np.array(ends_of_documents, np.int64).tobytes())
        self.num_documents += len(ends_of_documents)
        if not rows:
            return
        lengths = np.array([self._checked_length(self.num_rows + i, row) for i, row in enumerate(rows)])
        joined = np.concatenate(rows)
        self._check_ids(joined, lengths)
        tokens = joined.astype(np.uint32, copy=False)
        ends = np.cumsum(lengths)
        keys = row_keys(self.tokenizer_sha256, tokens, [0, *ends.tolist()])
        with self._store_errors():
            self._files["tokens"].write(tokens.tobytes())
            self._files["starts"].write((self.num_positions + ends).astype(np.int64).tobytes())
            self._files["keys"].write(key_records(keys, self.num_rows).tobytes())
        self._keep_untaught(rows, taught)
        self.num_rows += len(rows)
        self.num_positions += len(tokens)
        self.longest_row = max(self.longest_row, int(lengths.max()))
        self.max_token_id = max(self.max_token_id, int(tokens.max()))

    def _keep_untaught(self, rows: list[Tokens], taught: list[NDArray[np.bool_] | None]) -> None:
        """Write where targets are not to be learnt; what is left out of the file reads as zeros, which is learnt."""
        if all(mask is None for mask in taught):
            return
        for index, (row, mask) in enumerate(zip(rows, taught, strict=True), start=self.num_rows):
            if mask is not None and (mask.dtype != np.bool_ or mask.shape != row.shape):
                raise InvalidInput(
                    f"row {index} has a loss mask of {mask.dtype}{list(mask.shape)}; it must be bool{list(row.shape)}, "
                    "one value a token"
                )
        untaught = np.concatenate(
            [np.zeros(len(row), np.bool_) if mask is None else ~mask for row, mask in zip(rows, taught, strict=True)]
        )
        self.num_untaught += int(untaught.sum())
        with self._store_errors():
            self._files["untaught"].seek(self.num_positions)
            self._files["untaught"].write(untaught.tobytes())

    def _checked_length(self, index: int, row: NDArray[Any]) -> int:
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise InvalidInput(f"row {index} is {row.dtype}{list(row.shape)}; a row is a flat array of token ids")
        if not 1 <= len(row) <= self.row_tokens:
            if not len(row):
                raise InvalidInput(f"row {index} is empty; a row has at least one token: leave it out")
            raise InvalidInput(
                f"row {index} has {counted(len(row), 'token')}, the corpus takes rows of up to {self.row_tokens}; "
                "raise --row-tokens or cut it first"
            )
        return len(row)

    def _check_ids(self, joined: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        outside = (joined < 0) | (joined >= self.vocab_size)
        if outside.any():
            place = int(outside.argmax())
            index = self.num_rows + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise InvalidInput(
                f"row {index} has the token id {joined[place]}, the tokenizer's ids end at {self.vocab_size - 1}; "
                "give the tokenizer that the rows were made with"
            )

    def _blocks(self, name: str, dtype: np.dtype[Any], count: int, size: int) -> Iterator[NDArray[Any]]:
        for start in range(0, count, size):
            with self._store_errors():
                block = np.fromfile(self._folder / name, dtype, min(size, count - start), offset=start * dtype.itemsize)
            yield block

    def _store_errors(self) -> Any:
        return store_errors(f"temporary files in {self._folder}")
