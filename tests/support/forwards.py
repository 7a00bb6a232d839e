"""Answers of a real engine on a tiny model, against a plain forward."""

from __future__ import annotations

import numpy as np

from potstill.cache.types import Targets, Tokens

VOCAB = 512
TOLERANCE = 1e-3
"""Nats; two float32 implementations of one model."""


def random_row(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).astype(np.uint32)


def assert_matches(targets: Targets, dense: np.ndarray, row: Tokens) -> None:
    """Positions, values, order, labels and tails against full float32 logprobs [T, V]."""
    assert targets.num_positions == len(row)
    theirs = np.take_along_axis(dense, targets.ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(targets.logprobs, theirs, atol=TOLERANCE)
    best = -np.sort(-dense, axis=1)[:, : targets.k]
    np.testing.assert_allclose(targets.logprobs, best, atol=TOLERANCE)
    assert (np.diff(targets.logprobs, axis=1) <= 0).all()
    assert (np.diff(np.sort(targets.ids, axis=1), axis=1) > 0).all(), "an id came twice"
    labels = dense[np.arange(len(row) - 1), row[1:].astype(np.int64)]
    np.testing.assert_allclose(targets.label_logprob[:-1], labels, atol=TOLERANCE)
    assert np.isnan(targets.label_logprob[-1])
    tail = 1.0 - np.exp(best.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(np.exp(targets.log_tail.astype(np.float64)), tail, atol=TOLERANCE)
