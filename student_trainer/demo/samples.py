"""Samples of a few held-out positions: the text so far, and the next tokens that teacher and students expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from potstill.cache import Targets
from potstill.cache.corpus import Corpus
from potstill.cache.types import Tokens
from potstill.student_trainer.models.build import load_student

_CONTEXT_TOKENS = 40
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Guess:
    """A token and its probability."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One held-out position."""

    context: str
    next_text: str
    guesses: dict[str, list[Guess]]
    """The likeliest next tokens, by the name of the teacher or student."""


def samples(
    corpus: Corpus, rows: Sequence[int], targets: Sequence[Targets], teacher: str, students: Mapping[str, Path]
) -> list[Sample]:
    """Sample two positions of each row: after a half and after four fifths of it."""
    models = {name: load_student(path) for name, path in students.items()}
    found = []
    for index, of_row in zip(rows, targets, strict=True):
        row = corpus.row(index)
        guesses_of = {name: _top(model, row) for name, model in models.items()}
        for position in (len(row) // 2, len(row) * 4 // 5):
            kept = zip(of_row.ids[position, :_SHOWN], np.exp(of_row.logprobs[position, :_SHOWN]), strict=True)
            guesses = {teacher: _guesses(corpus.tokenizer, kept)}
            guesses |= {name: _guesses(corpus.tokenizer, top[position]) for name, top in guesses_of.items()}
            start = max(0, position + 1 - _CONTEXT_TOKENS)
            found.append(
                Sample(
                    context=corpus.tokenizer.decode(row[start : position + 1].tolist()),
                    next_text=corpus.tokenizer.decode([int(row[position + 1])]),
                    guesses=guesses,
                )
            )
    return found


def _top(model: torch.nn.Module, row: Tokens) -> list[list[tuple[int, float]]]:
    """The likeliest ids and their probabilities at every position of a row."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0]
    top = logits.float().softmax(-1).topk(_SHOWN)
    return [list(zip(ids, p, strict=True)) for ids, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _guesses(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]] | zip[tuple[int, float]]) -> list[Guess]:
    return [Guess(tokenizer.decode([int(token)]), round(float(p), 4)) for token, p in pairs]
