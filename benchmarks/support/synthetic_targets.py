"""Exact targets of a made-up teacher with any vocabulary, for sizes and errors where no real model is at hand.

    h[t]       = 0.8 e[x[t]] + 0.5 e[x[t-1]] + 0.33 e[x[t-2]]       e: [V, 48] of N(0, 1/48)
    logits[t]  = -1.2 log(rank(v) + 2.7) + s[t] o[v] . h[t]        o: [V, 48] of N(0, 1); rank: a fixed permutation
    s[t]       = 4.2 exp(0.35 N(0, 1))

The text is drawn from the teacher itself, so that frequent ids are frequent in both. At V = 32k the mass outside its
top 8, 16, 64, 128, 256 is 0.27, 0.20, 0.10, 0.07, 0.04, SmolLM2's 0.24, 0.18, 0.10, 0.07, 0.04. Made once, then read
from `~/.cache/potstill/bench`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache import Draws, Targets

K = 256
DRAWS = 50
ROW_TOKENS = 512
_WIDTH = 48


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Rows of tokens with their exact top-256 targets and 50 draws, flat."""

    name: str
    vocab_size: int
    tokens: NDArray[np.uint32]
    row_starts: NDArray[np.int64]
    targets: Targets


def load(vocab_size: int, positions: int) -> Sample:
    """The targets, made at the first call: about two minutes for 16,384 positions of V=262,144."""
    rows = max(positions // ROW_TOKENS, 1)
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "potstill" / "bench"
    path = folder / f"synthetic-v{vocab_size}-r{rows}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        columns: dict[str, Any] = dict(_make(vocab_size, rows))
        np.savez(partial, **columns)
        os.replace(partial, path)
    with np.load(path) as data:
        return _sample(vocab_size, {name: data[name] for name in data.files})


def make(vocab_size: int, positions: int) -> Sample:
    """Make a sample, and keep it nowhere."""
    return _sample(vocab_size, _make(vocab_size, max(positions // ROW_TOKENS, 1)))


def _sample(vocab_size: int, a: dict[str, NDArray[Any]]) -> Sample:
    targets = Targets(
        ids=a["ids"],
        logprobs=a["logprobs"],
        log_tail=a["log_tail"],
        label_logprob=a["label_logprob"],
        draws=Draws(a["draw_offsets"], a["draw_ids"], a["draw_counts"]),
    )
    starts = np.arange(0, len(a["tokens"]) + 1, ROW_TOKENS, dtype=np.int64)
    return Sample(f"synthetic V={vocab_size:,}", vocab_size, a["tokens"], starts, targets)


def _make(vocab_size: int, rows: int) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(vocab_size)
    inward = (rng.standard_normal((vocab_size, _WIDTH)) / np.sqrt(_WIDTH)).astype(np.float32)
    outward = rng.standard_normal((vocab_size, _WIDTH)).astype(np.float32)
    prior = (-1.2 * np.log(rng.permutation(vocab_size) + 2.7)).astype(np.float32)
    kept: dict[str, list[NDArray[np.generic]]] = {}
    last = rng.integers(0, vocab_size, (3, rows))
    for _ in range(ROW_TOKENS):
        state = 0.8 * inward[last[0]] + 0.5 * inward[last[1]] + 0.33 * inward[last[2]]
        state *= 4.2 * np.exp(0.35 * rng.standard_normal((rows, 1)))
        logits = (prior + state.astype(np.float32) @ outward.T).astype(np.float32)
        step = _step(logits, rng)
        step["tokens"] = last[0].astype(np.uint32)
        step["label_logprob"] = np.take_along_axis(logits, step["next"].astype(np.int64)[:, None], axis=1)[:, 0]
        for name, array in step.items():
            kept.setdefault(name, []).append(array)
        last = np.concatenate([step["next"].astype(np.int64)[None], last[:2]])
    return _columns(kept, rows)


def _step(logits: NDArray[np.float32], rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """One position of every row; `logits` become logprobs in place."""
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits.astype(np.float64))
    total = weights.sum(axis=1, keepdims=True)
    logits -= np.log(total).astype(np.float32)
    cumulative = np.cumsum(weights, axis=1)
    picks = rng.random((len(logits), DRAWS + 1)) * total
    drawn = np.stack([np.searchsorted(row, p, side="right") for row, p in zip(cumulative, picks, strict=True)])
    top = np.argpartition(-logits, K, axis=1)[:, :K]
    values = np.take_along_axis(logits, top, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    mass = np.take_along_axis(weights, top, axis=1).sum(axis=1) / total[:, 0]
    return {
        "ids": np.take_along_axis(top, order, axis=1).astype(np.uint32),
        "logprobs": np.take_along_axis(values, order, axis=1),
        "log_tail": np.log(np.maximum(1 - mass, 1e-12)).astype(np.float32),
        "drawn": np.sort(drawn[:, 1:], axis=1).astype(np.uint32),
        "next": drawn[:, 0].astype(np.uint32),
    }


def _columns(kept: dict[str, list[NDArray[np.generic]]], rows: int) -> dict[str, NDArray[np.generic]]:
    """Row after row instead of position after position."""
    columns = {name: np.stack(arrays, axis=1) for name, arrays in kept.items()}
    columns = {name: array.reshape(rows * ROW_TOKENS, *array.shape[2:]) for name, array in columns.items()}
    columns["label_logprob"][ROW_TOKENS - 1 :: ROW_TOKENS] = np.nan
    unique = [np.unique(position, return_counts=True) for position in columns.pop("drawn")]
    columns.pop("next")
    columns["draw_offsets"] = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in unique])]).astype(np.int64)
    columns["draw_ids"] = np.concatenate([ids for ids, _ in unique]).astype(np.uint32)
    columns["draw_counts"] = np.concatenate([counts for _, counts in unique]).astype(np.uint16)
    return columns
