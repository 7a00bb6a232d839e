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


def writings(
    corpus: Corpus, rows: Sequence[int], models: Mapping[str, PreTrainedModel], prefix: Sequence[int] = ()
) -> list[Writing]:
    """Have each model write on from the beginning of each row, behind the prefix that it knows."""
    found = []
    for index in rows:
        row = corpus.row(index)
        # Of a short row a half, so that there is text to compare with.
        cut = min(_CONTEXT_TOKENS, max(1, len(row) // 2))
        prompt, real = row[:cut].tolist(), row[cut:][:_WRITTEN_TOKENS].tolist()
        goes_on = {"the text itself": real}
        goes_on |= {name: _written(model, [*prefix, *prompt]) for name, model in models.items()}
        decode = corpus.tokenizer.decode
        found.append(Writing(prompt=decode(prompt), goes_on={name: decode(ids) for name, ids in goes_on.items()}))
    return found


def _written(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = _WRITTEN_TOKENS if positions is None else min(_WRITTEN_TOKENS, positions - len(prompt))
    if room < 1:
        return []
    with torch.no_grad():
        ids = _ids(model, prompt)
        out: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False
        )
    return out[0, len(prompt) :].tolist()


def samples(
    corpus: Corpus,
    rows: Sequence[int],
    targets: Mapping[str, Sequence[Targets]],
    students: Mapping[str, PreTrainedModel],
    prefix: Sequence[int] = (),
) -> list[Sample]:
    """Sample two positions of each row: after a half and after four fifths of it.

    Args:
        corpus: of one tokenizer with all models.
        rows: of at least two tokens.
        targets: of each row, by the name of the teacher.
        students: by name.
        prefix: token ids that students see in front of each row.
    """
    found = []
    for i, index in enumerate(rows):
        row = corpus.row(index)
        guesses_of = {name: _top(model, row, prefix) for name, model in students.items()}
        for position in (min(len(row) // 2, len(row) - 2), min(len(row) * 4 // 5, len(row) - 2)):
            guesses = {name: _guesses(corpus.tokenizer, _kept(each[i], position)) for name, each in targets.items()}
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


def _kept(targets: Targets, position: int) -> list[tuple[int, float]]:
    likeliest = np.argsort(-targets.logprobs[position], kind="stable")[:_SHOWN]  # all ids come in their own order
    ids, logprobs = targets.ids[position, likeliest], targets.logprobs[position, likeliest]
    return list(zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True))


def _top(model: torch.nn.Module, row: Tokens, prefix: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The likeliest ids and their probabilities at every position of a row."""
    with torch.no_grad():
        logits = model(input_ids=_ids(model, [*prefix, *row.tolist()])).logits[0, len(prefix) :]
    top = logits.float().softmax(-1).topk(_SHOWN)
    return [list(zip(ids, p, strict=True)) for ids, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _ids(model: torch.nn.Module, row: Sequence[int]) -> torch.Tensor:
    return torch.tensor([row], device=next(model.parameters()).device)


def _guesses(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]]) -> list[Guess]:
    return [Guess(tokenizer.decode([token]), round(p, 4)) for token, p in pairs]
