"""The body of `/v1/completions`, as vLLM 0.32 takes it, as far as it asks for the logprobs of a prompt.

    key                         taken
    model                       a teacher's name; may be left out where there is one teacher or the URL names it
    prompt                      one list of token ids, or a list of such lists; no text
    prompt_logprobs             K of at least 0; with `echo` alone, `logprobs` stands for it, as in vLLM
    logprobs                    of the one token after the prompt, and with `echo` of the prompt's
    max_tokens                  0, 1 or left out, which is 1 (vLLM's own default of 16 is for those who want text)
    echo, return_token_ids      as in vLLM
    n, stream, ...              what would change the answer and is not here is refused, see `_REFUSED`

All other keys are ignored, as they shape nothing but text and the choice of the token after the prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Tokens
from potstill.teacher_service.admission.limits import rows_of_tokens
from potstill.teacher_service.settings import LimitSettings

_REFUSED: Mapping[str, tuple[Any, str]] = {
    "n": (1, "ask for one answer a prompt"),
    "best_of": (1, "ask for one answer a prompt"),
    "stream": (False, "send stream=false: prompt logprobs come in one answer"),
    "use_beam_search": (False, "leave it out: nothing is generated here"),
    "return_tokens_as_token_ids": (True, "leave it out: tokens are answered as ids, there is no tokenizer here"),
    "truncate_prompt_tokens": (None, "cut the prompt before it is sent"),
    "prompt_embeds": (None, "send token ids"),
    "logprob_token_ids": (None, "ask for the top-k with prompt_logprobs"),
    "suffix": (None, "leave it out: nothing is generated here"),
}
"""The one value, beside null, that is accepted for a key, and the way out for any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A trainer's request for the logprobs of some prompts."""

    model: str | None
    rows: list[Tokens]
    prompt_logprobs: int | None
    """Entries beside the prompt's own token, or None when they are not asked for."""
    logprobs: int | None
    """Entries of the token after the prompt, and with `echo` of the prompt's tokens, or None."""
    max_tokens: int
    echo: bool
    return_token_ids: bool
    request_id: str

    @classmethod
    def from_body(cls, body: bytes, limits: LimitSettings) -> Self:
        """Read a request.

        Raises:
            LimitExceeded: more rows or tokens than the limits allow.
            InvalidInput: not JSON, a key of the wrong type, or a value that this service does not support.
        """
        value = rows_of_tokens(body, limits)
        if not isinstance(value, dict):
            raise InvalidInput('the body must be a JSON object like {"prompt": [[1, 2]], "prompt_logprobs": 8}')
        _refuse_what_is_not_here(value)
        echo = _flag(value, "echo")
        logprobs = _count(value, "logprobs")
        prompt_logprobs = _count(value, "prompt_logprobs")
        if prompt_logprobs is None and echo:
            prompt_logprobs = logprobs
        if prompt_logprobs is None and logprobs is None:
            raise InvalidInput("nothing but text is asked for, and none is generated here; set prompt_logprobs")
        max_tokens = _count(value, "max_tokens")
        if max_tokens is not None and max_tokens > 1:
            raise InvalidInput(f"max_tokens is {max_tokens}, but prompts are scored here and not continued; send 1")
        _check_temperature(value.get("temperature"))
        model = value.get("model")
        if model is not None and not isinstance(model, str):
            raise InvalidInput("model must be the name of a teacher; /v1/models lists them")
        return cls(
            model=model,
            rows=_rows(value.get("prompt")),
            prompt_logprobs=prompt_logprobs,
            logprobs=logprobs,
            max_tokens=1 if max_tokens is None else max_tokens,
            echo=echo,
            return_token_ids=_flag(value, "return_token_ids"),
            request_id=str(value.get("request_id") or ""),
        )

    @property
    def k(self) -> int:
        """Entries to score: at least one, as without any there is no label and no token after the prompt."""
        return max(self.prompt_logprobs or 0, self.logprobs or 0, 1)


def _refuse_what_is_not_here(value: Mapping[str, Any]) -> None:
    for key, (taken, way_out) in _REFUSED.items():
        given = value.get(key)
        if given is not None and given != taken:
            raise InvalidInput(f"{key}={_shown(given)} is not done here; {way_out}")


def _check_temperature(value: Any) -> None:
    # It chooses the token after the prompt in vLLM; logprobs are of temperature 1 whatever it is, there and here.
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
    if value is not None and wrong:
        raise InvalidInput(f"temperature is {_shown(value)}; it must be a number of at least 0")


def _count(value: Mapping[str, Any], key: str) -> int | None:
    given = value.get(key)
    if given is None:
        return None
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if given == -1 and key != "max_tokens":
        raise InvalidInput(f"{key}=-1 asks for the whole vocabulary; ask for at most the teacher's max_top_k")
    if not isinstance(given, int) or given < 0:
        raise InvalidInput(f"{key} is {_shown(given)}; it must be a whole number of at least 0")
    return int(given)  # a trainer may send true for 1, which vLLM takes too


def _flag(value: Mapping[str, Any], key: str) -> bool:
    given = value.get(key)
    if given is not None and not isinstance(given, bool):
        raise InvalidInput(f"{key} is {_shown(given)}; it must be true or false")
    return bool(given)


def _rows(prompt: Any) -> list[Tokens]:
    if isinstance(prompt, str) or (isinstance(prompt, list) and any(isinstance(part, str) for part in prompt)):
        raise InvalidInput(
            "the prompt is text, and there is no tokenizer here; send token ids, a list for each prompt: [[1, 2, 3]]"
        )
    if not isinstance(prompt, list) or not prompt:
        raise InvalidInput("prompt must be a list of token ids, or a list of such lists")
    rows = prompt if isinstance(prompt[0], list) else [prompt]
    return [_row(index, row) for index, row in enumerate(rows)]


def _row(index: int, row: Any) -> Tokens:
    if not isinstance(row, list):
        raise InvalidInput(f"prompt {index} must be a list of token ids")
    # Of a JSON list these are exact types: bool, float, str and None are none of them.
    if not set(map(type, row)) <= {int}:
        wrong = next(token for token in row if type(token) is not int)
        raise InvalidInput(f"prompt {index} has {_shown(wrong)}; a token id is a whole number")
    if row and not 0 <= min(row) <= max(row) < 2**32:
        wrong = next(token for token in row if not 0 <= token < 2**32)
        raise InvalidInput(f"prompt {index} has {_shown(wrong)}; a token id is a whole number in [0, 2**32)")
    return np.array(row, dtype=np.uint32)


def _shown(value: Any) -> str:
    return json.dumps(value)[:40]
