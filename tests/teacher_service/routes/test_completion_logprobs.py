"""`logprobs` of completions: the text is what JSON would write, and is not held whole."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from potstill.cache.types import Targets, Tokens
from potstill.teacher_service.routes.completions.request import CompletionRequest
from potstill.teacher_service.routes.completions.routes import _choice
from potstill.teacher_service.settings import LimitSettings
from tests.support.scored_rows import random_targets, without_doubles

VOCAB = 130
MIB = 2**20


def asking(row: Tokens, **body: Any) -> CompletionRequest:
    return CompletionRequest.from_body(json.dumps({"prompt": row.tolist(), **body}).encode(), LimitSettings())


def top(label: int, targets: Targets, at: int, k: int, most: int) -> dict[str, float]:
    """The label's logprob and those of the top k at a position, `most` in all, one Python object after the other."""
    ids = targets.ids[at].tolist()[: max(k, 1)]
    own = targets.logprobs[at, ids.index(label)] if label in ids else targets.label_logprob[at]
    entries = {label: float(own)}
    for token, logprob in zip(ids[:k], targets.logprobs[at].tolist(), strict=False):
        entries.setdefault(token, logprob)
    return {f"token_id:{token}": max(x, -9999.0) for token, x in list(entries.items())[:most]}


def plainly(row: Tokens, targets: Targets, asked: CompletionRequest) -> dict[str, Any]:
    assert asked.logprobs is not None
    tokens, tops = [], []
    most = asked.logprobs + 1
    if asked.echo:
        tokens = row.tolist()
        k = min(asked.prompt_logprobs or 0, most)
        tops = [None, *(top(token, targets, at, k, most) for at, token in enumerate(tokens[1:]))]
    if asked.max_tokens:
        tokens = [*tokens, int(targets.ids[-1, 0])]
        tops = [*tops, top(tokens[-1], targets, len(row) - 1, most - 1, most)]
    names = [f"token_id:{token}" for token in tokens]
    return {
        "text_offset": [sum(map(len, names[:at])) for at in range(len(names))],
        "token_logprobs": [None if each is None else each[name] for name, each in zip(names, tops, strict=True)],
        "tokens": names,
        "top_logprobs": tops,
    }


def rounded(value: Any) -> Any:
    """The value with its numbers as they are written, and each object as a list in its order."""
    if isinstance(value, dict):
        return [(key, rounded(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 8) + 0.0 if isinstance(value, float) else value


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize(
    ("logprobs", "prompt_logprobs"), [(0, None), (3, None), (3, 12), (3, 4), (12, 3), (3, 0), (0, 5)]
)
def test_the_text_is_what_json_would_write(
    echo: bool, max_tokens: int, logprobs: int, prompt_logprobs: int | None
) -> None:
    for seed, num_tokens in enumerate((1, 2, 40)):
        row, targets = random_targets(seed, num_tokens, 12, VOCAB)
        asked = asking(row, echo=echo, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        choice = json.loads(b"".join(_choice(0, row, targets, asked)), object_pairs_hook=without_doubles)
        assert rounded(choice["logprobs"]) == rounded(plainly(row, targets, asked))


def test_a_long_one_is_written_in_pieces_that_are_not_kept() -> None:
    row, targets = random_targets(0, 2000, 128, VOCAB)
    asked = asking(row, echo=True, logprobs=128, return_token_ids=True)
    _ = sum(map(len, _choice(0, row[:9], targets[:9], asked)))  # the tables, which are kept
    tracemalloc.start()
    try:
        written = sum(map(len, _choice(0, row, targets, asked)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert written > 12 * MIB
    assert peak < 3 * MIB


def test_its_numbers_are_those_of_its_lists() -> None:
    row, targets = random_targets(5, 30, 8, VOCAB)
    text = b"".join(_choice(0, row, targets, asking(row, echo=True, logprobs=8, max_tokens=0)))
    found = json.loads(text)["logprobs"]
    named = zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True)
    np.testing.assert_array_equal(found["token_logprobs"][1:], [each[name] for name, each in named])
