"""The start-up check of a LokiLM model in vLLM: the same positions by `transformers`.

An attention kernel that forgot the slopes would give plausible, wrong numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.types import Targets, Tokens

_POSITIONS = 100
_LIMITS = {"float32": 0.01, "quantised": 0.5}
_HALF = 0.1
"""Most nats, on average by probability, between two computations; of weights in half precision, if not in `_LIMITS`."""


def compared_row(vocab_size: int, max_tokens: int) -> list[int]:
    """The row of token ids [T] to compare on, with ids of the whole vocabulary."""
    row: list[int] = np.random.default_rng(0).integers(vocab_size, size=min(_POSITIONS, max_tokens)).tolist()
    return row


def plain_logprobs(model: str, revision: str | None, row: Tokens) -> NDArray[np.float32]:
    """Logprobs [T, V] of one row [T] by `transformers` in float32 on the CPU; the model is loaded for it."""
    import torch  # noqa: PLC0415 -- only here
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    loaded = AutoModelForCausalLM.from_pretrained(
        model, revision=revision, dtype=torch.float32, attn_implementation="sdpa"
    )
    with torch.inference_mode():
        logits = loaded.eval()(torch.as_tensor(row, dtype=torch.int64)[None], use_cache=False).logits[0]
    found: NDArray[np.float32] = logits.log_softmax(dim=-1).numpy()
    return found


def too_far(ours: Targets, plain: NDArray[np.float32], dtype: str, quantization: str | None) -> str:
    """Compare targets of vLLM with all logprobs [T, V] of `transformers`; what is wrong, or nothing.

    Args:
        ours: the top-k of the row.
        plain: of the same row.
        dtype: of vLLM's weights.
        quantization: vLLM's method, or None.
    """
    theirs = np.take_along_axis(plain, ours.ids.astype(np.int64), axis=1)
    kept = np.exp(ours.logprobs.astype(np.float64))
    apart = float((kept * np.abs(ours.logprobs - theirs)).sum(axis=1).mean())
    most = _LIMITS.get("quantised" if quantization else dtype, _HALF)
    if apart <= most:
        return ""
    return (
        f"vLLM is {apart:.3g} nats from transformers on average over {len(plain)} positions, where {most} may be: its "
        "attention may ignore the slopes of ALiBi; give the teacher another attention_backend"
    )
