"""A teacher that costs its process next to nothing and takes as long as it is told: what overlap is measured with.

The distribution after a token depends on this token and the one before: one of a few tables, made once, with all ids
shifted by a little. Ids are skewed to the low ones and the top 64 hold most of the mass, as in real text, so that
a writer's work on the targets costs what it costs with a real teacher's.

    python -m benchmarks.support.paced_teacher [--vocab 49152] [--top-k 64] [--draws 0]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache import Draws, Fields, Targets
from potstill.cache.types import TeacherIdentity, Tokens
from tests.support.fakes import FakeTeacher, fake_identity

_SHIFTS = 61
_ZIPF = 1.3  # exponent of an id's average mass, and
_SPREAD = 1.4  # the scale of its Gumbel noise: the top 64 of 49,152 hold about 0.9 together


class PacedTeacher(FakeTeacher):
    """`positions_per_second` 0 is as fast as it can. Seeds give other draws per table, not per row."""

    def __init__(
        self, identity: TeacherIdentity | None = None, *, positions_per_second: float = 0.0, tables: int = 128
    ) -> None:
        super().__init__(identity, tokens_per_second=positions_per_second)
        vocab_size = self.identity.vocab_size
        rng = np.random.default_rng(0)
        falling = -_ZIPF * np.log1p(np.arange(vocab_size))
        self._dense = np.stack(
            [_normalised(falling + rng.gumbel(scale=_SPREAD, size=vocab_size)) for _ in range(tables)]
        )
        self._made: dict[Fields, Targets] = {}

    def dense_logprobs(self, row: Tokens) -> NDArray[np.float64]:
        """[T, V] in float64."""
        table, shift = self._places(row)
        unshifted = (np.arange(self.identity.vocab_size) - shift[:, None]) % self.identity.vocab_size
        dense: NDArray[np.float64] = np.take_along_axis(self._dense[table], unshifted, axis=1).astype(np.float64)
        return dense

    def targets(self, row: Tokens, want: Fields) -> Targets:
        """Everything that is wanted of one row, from the tables."""
        made = self._tables(want)
        table, shift = self._places(row)
        vocab_size = self.identity.vocab_size
        columns: dict[str, Any] = {
            name: None if array is None else array[table]
            for name in ("logprobs", "log_tail", "label_logprob", "entropy", "log_z")
            for array in [getattr(made, name)]
        }
        if want.k:
            labels = (row[1:].astype(np.int64) - shift[:-1]) % vocab_size
            columns["label_logprob"][:-1] = self._dense[table[:-1], labels]
        return Targets(
            ids=((made.ids[table] + shift[:, None].astype(np.uint32)) % np.uint32(vocab_size)).astype(np.uint32),
            dense=self.dense_logprobs(row).astype(np.float32) if want.dense else None,
            draws=None if made.draws is None else _shifted(made.draws, table, shift, vocab_size),
            **columns,
        )

    def _tables(self, want: Fields) -> Targets:
        """The targets of each table, unshifted, without labels or dense."""
        if want not in self._made:
            asked = replace(want, dense=False, entropy=True)
            each = [_Table(self.identity, dense).targets(np.zeros(1, np.uint32), asked) for dense in self._dense]
            made = Targets.concat(each)
            self._made[want] = made if want.entropy else replace(made, entropy=None)
        return self._made[want]

    def _places(self, row: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[T] which table, and by how much its ids are shifted."""
        tokens = row.astype(np.int64)
        context = (tokens * 2654435761 + np.concatenate([[0], tokens[:-1]]) * 40503) >> 7
        return context % len(self._dense), (context >> 11) % min(_SHIFTS, self.identity.vocab_size)


class _Table(FakeTeacher):
    """One fixed distribution, whatever the row."""

    def __init__(self, identity: TeacherIdentity, dense: NDArray[np.float32]) -> None:
        super().__init__(identity)
        self._fixed = dense

    def dense_logprobs(self, row: Tokens) -> NDArray[np.float64]:
        return np.repeat(self._fixed[None].astype(np.float64), len(row), axis=0)


def _normalised(logits: NDArray[np.float64]) -> NDArray[np.float32]:
    logprobs: NDArray[np.float32] = (logits - np.logaddexp.reduce(logits)).astype(np.float32)
    return logprobs


def _shifted(draws: Draws, table: NDArray[np.int64], shift: NDArray[np.int64], vocab_size: int) -> Draws:
    """The draws of a table for each position, with ids shifted and rising again."""
    lengths = np.diff(draws.offsets)[table]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    held = np.arange(int(offsets[-1])) + np.repeat(draws.offsets[table] - offsets[:-1], lengths)
    position = np.repeat(np.arange(len(table)), lengths)
    ids = (draws.ids[held] + np.repeat(shift, lengths)) % vocab_size
    order = np.argsort(position * vocab_size + ids)
    return Draws(offsets, ids[order].astype(np.uint32), draws.counts[held][order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--draws", type=int, default=0)
    args = parser.parse_args()
    teacher = PacedTeacher(fake_identity(vocab_size=args.vocab))
    want = Fields(k=args.top_k, draws=args.draws)
    rows = np.random.default_rng(1).integers(0, args.vocab, (200, 512)).astype(np.uint32)
    first = teacher.targets(rows[0], want)
    begin = time.process_time()
    for row in rows:
        teacher.targets(row, want)
    seconds = time.process_time() - begin
    rate = rows.size / seconds
    print(f"{rate:,.0f} positions/s of one core; at 20,000 a second it takes {2e4 / rate:.1%}")
    if args.top_k:
        print(f"mass of the top {args.top_k}: {1 - np.exp(first.log_tail).mean():.3f}")


if __name__ == "__main__":
    main()
