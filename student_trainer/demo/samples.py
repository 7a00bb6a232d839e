"""Samples of held-out text: the next tokens that teacher and students expect at a few places, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from potstill.cache import Targets
from potstill.cache.corpus import Corpus
from potstill.cache.types import Tokens

_CONTEXT_TOKENS = 40
_SHOWN = 5
_WRITTEN_TOKENS = 32


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The beginning of a held-out row, and how it goes on."""

    prompt: str
    goes_on: dict[str, str]
    """The likeliest text, token by token, by the name of who writes it; and the row's own."""


def writings(corpus: Corpus, rows: Sequence[int], models: Mapping[str, PreTrainedModel]) -> list[Writing]:
    """Have each model write on from the beginning of each row."""
    found = []
    for index in rows:
        row = corpus.row(index)
        prompt, real = row[:_CONTEXT_TOKENS].tolist(), row[_CONTEXT_TOKENS:][:_WRITTEN_TOKENS].tolist()
        goes_on = {"the text itself": real} | {name: _written(model, prompt) for name, model in models.items()}
        decode = corpus.tokenizer.decode
        found.append(Writing(prompt=decode(prompt), goes_on={name: decode(ids) for name, ids in goes_on.items()}))
    return found


def _written(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_WRITTEN_TOKENS, do_sample=False
        )
    return out[0, len(prompt) :].tolist()


def samples(
    corpus: Corpus,
    rows: Sequence[int],
    targets: Sequence[Targets],
    teacher: str,
    students: Mapping[str, PreTrainedModel],
) -> list[Sample]:
    """Sample two positions of each row: after a half and after four fifths of it."""
    found = []
    for index, of_row in zip(rows, targets, strict=True):
        row = corpus.row(index)
        guesses_of = {name: _top(model, row) for name, model in students.items()}
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
