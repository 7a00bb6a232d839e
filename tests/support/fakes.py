"""Deterministic stand-ins for the parts a test does not exercise. They implement the real protocols."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from potstill.cache import Fields, Provenance, Targets, TeacherIdentity
from potstill.cache.encoding.draws import check_num_draws, draw_rows
from potstill.cache.errors import LimitExceeded, UnsupportedField
from potstill.cache.types import TeacherLimits, Tokens

_WAVE = 8.0 * np.sin(np.arange(10_007, dtype=np.float64))


def fake_identity(*, vocab_size: int = 64, tokenizer_sha256: str = "0" * 64, model: str = "fake") -> TeacherIdentity:
    """Another model has other weights."""
    return TeacherIdentity(
        model=model,
        revision="1",
        weights_sha256=hashlib.sha256(model.encode()).hexdigest(),
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        dtype="float32",
        head_dtype="float32",
    )


class FakeTeacher:
    """A distribution that depends on the tokens up to each position only, so any batching gives the same bits.

    It answers every field, or with `top_k_only` refuses all but the top-k. `tokens_per_second` paces it, however many
    callers there are; `scored` counts the rows it was really asked for.
    """

    def __init__(
        self, identity: TeacherIdentity | None = None, *, tokens_per_second: float = 0.0, top_k_only: bool = False
    ) -> None:
        self._identity = identity or fake_identity()
        self._tokens_per_second = tokens_per_second
        self._top_k_only = top_k_only
        self._busy_until = 0.0
        self.scored: list[bytes] = []

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    @property
    def provenance(self) -> Provenance:
        return Provenance(engine="fake", engine_version="1", device="none", capture_path="fake")

    @property
    def limits(self) -> TeacherLimits:
        return TeacherLimits(max_top_k=self._identity.vocab_size)

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        if self._top_k_only and not want.only_top_k:
            asked = ", ".join(each.asked_by for each in want.beside_top_k)
            raise UnsupportedField(f"this teacher holds the top-k only; {asked} is not there: ask without it")
        if want.draws:
            check_num_draws(want.draws)
        if want.k > self._identity.vocab_size:
            raise LimitExceeded(f"k={want.k} is over the vocabulary of {self._identity.vocab_size}")
        for index, row in enumerate(rows):
            if len(row) and int(row.max()) >= self._identity.vocab_size:
                size = self._identity.vocab_size
                raise LimitExceeded(f"row {index} has the token id {row.max()}, outside the vocabulary of {size}")
        self.scored.extend(row.tobytes() for row in rows)
        done = self._reserve(sum(map(len, rows)))
        answers = [self.targets(row, want) for row in rows]
        await asyncio.sleep(max(0.0, done - asyncio.get_running_loop().time()))
        return answers

    def _reserve(self, num_tokens: int) -> float:
        """When these tokens are scored, after all that came before them."""
        begin = max(asyncio.get_running_loop().time(), self._busy_until)
        self._busy_until = begin + (num_tokens / self._tokens_per_second if self._tokens_per_second else 0.0)
        return self._busy_until

    def dense_logprobs(self, row: Tokens) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """[T, V] full logprobs in float64: what a test compares with."""
        state = np.cumsum((row.astype(np.int64) + 1) * 2654435761 % 1_000_003)
        vocab = np.arange(self._identity.vocab_size, dtype=np.int64)
        phase = (state[:, None] * 31 + vocab[None, :] * 7919) % len(_WAVE)
        logits: np.ndarray[tuple[int, int], np.dtype[np.float64]] = _WAVE[phase] - 0.5 * np.log1p(vocab)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def targets(self, row: Tokens, want: Fields) -> Targets:
        """Everything that is wanted of one row, computed plainly in float64."""
        dense = self.dense_logprobs(row)
        top_k = _top_k(dense, row, want.k) if want.k else _top_k(dense, row, 1).without_top_k()
        tempered = [np.logaddexp.reduce(dense / t, axis=1) for t in want.temperatures]
        return replace(
            top_k,
            entropy=-(np.exp(dense) * dense).sum(axis=1).astype(np.float32) if want.entropy else None,
            log_z=np.stack(tempered, axis=1).astype(np.float32) if tempered else None,
            dense=dense.astype(np.float32) if want.dense else None,
            draws=draw_rows(dense, want.draws, want.seed, row.tobytes()) if want.draws else None,
        )

    def distribution(self, row: Tokens, k: int) -> Targets:
        """The top `k` of one row."""
        return _top_k(self.dense_logprobs(row), row, k)


def _top_k(dense: np.ndarray[tuple[int, int], np.dtype[np.float64]], row: Tokens, k: int) -> Targets:
    ids = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    logprobs = np.take_along_axis(dense, ids, axis=1)
    tail = 1.0 - np.exp(logprobs).sum(axis=1)
    log_tail = np.full(len(row), -np.inf)
    np.log(tail, out=log_tail, where=tail > 1e-12)
    label = np.full(len(row), np.nan)
    label[:-1] = dense[np.arange(len(row) - 1), row[1:]]
    return Targets(
        ids=ids.astype(np.uint32),
        logprobs=logprobs.astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        label_logprob=label.astype(np.float32),
    )


class GatedTeacher(FakeTeacher):
    """Waits in `score` until it is let go; counts who waits and who was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waiting = 0
        self.cancelled = 0

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        self.waiting += 1
        try:
            while not self.gate.is_set():  # noqa: ASYNC110  set by another thread
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return await super().score(rows, want)


class MoodyTeacher(FakeTeacher):
    """Raises what it is given, one call each, and waits while `gate` is shut."""

    def __init__(self, inner: FakeTeacher, errors: Sequence[Exception] = ()) -> None:
        super().__init__(inner.identity)
        self.errors = list(errors)
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        self.calls += 1
        while not self.gate.is_set():  # noqa: ASYNC110  set by another thread
            await asyncio.sleep(0.01)
        if self.errors:
            raise self.errors.pop(0)
        return await super().score(rows, want)


class BrokenTeacher(FakeTeacher):
    """Raises what it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        raise self.error
