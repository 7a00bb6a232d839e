"""LokiLM's model for vLLM, without an engine: what is refused, and the check against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Targets
from potstill.student_trainer.models.lokilm import modeling_lokilm
from potstill.teacher_service.engine.lokilm import TAKES_SLOPES, require_slopes
from potstill.teacher_service.engine.lokilm.check import compared_row, plain_logprobs, too_far
from tests.conftest import plain_forward
from tests.support.tiny_models import make_tiny_lokilm

ROW = compared_row(512, 255)


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLEX_ATTENTION", "FLASH_ATTN_DIFFKV"])
def test_a_backend_without_slopes_is_refused_in_one_line(backend: str) -> None:
    with pytest.raises(InvalidInput, match=rf"backend {backend} ignores the slopes .* FLASH_ATTN") as error:
        require_slopes(backend)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", TAKES_SLOPES)
def test_a_backend_with_slopes_is_taken(backend: str) -> None:
    require_slopes(backend)


def top(logprobs: NDArray[np.float32], k: int = 16) -> Targets:
    ids = np.argsort(-logprobs, axis=1)[:, :k].astype(np.uint32)
    kept = np.take_along_axis(logprobs, ids.astype(np.int64), axis=1)
    nothing = np.zeros(len(ids), np.float32)
    return Targets(ids=ids, logprobs=kept, log_tail=nothing, label_logprob=nothing)


def test_attention_that_forgets_slopes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, row = make_tiny_lokilm(tmp_path), np.asarray(ROW, np.uint32)
    plain = plain_logprobs(str(folder), None, row)
    assert plain.shape == (100, 512)
    np.testing.assert_allclose(plain, plain_forward(folder)(row), atol=1e-4)
    noise = np.random.default_rng(0).normal(size=plain.shape).astype(np.float32)
    assert too_far(top(plain + 1e-3 * noise), plain, "float32", None) == ""
    assert too_far(top(plain + 0.05 * noise), plain, "bfloat16", None) == ""
    assert "is 0.0" in too_far(top(plain + 0.05 * noise), plain, "float32", None)
    monkeypatch.setattr(modeling_lokilm, "alibi_slopes", lambda heads, device="cpu": torch.zeros(heads, device=device))
    flat = plain_logprobs(str(folder), None, row)
    for dtype in ("float32", "bfloat16"):
        found = too_far(top(flat), plain, dtype, None)
        assert "may ignore the slopes of ALiBi; give the teacher another attention_backend" in found
        assert "\n" not in found
