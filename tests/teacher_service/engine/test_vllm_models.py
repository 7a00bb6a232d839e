"""The real vLLM on models that are not one flat Llama: an adapter, a text model in one that also sees, and LokiLM's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potstill.cache.types import Fields
from potstill.teacher_service.engine.vllm_teacher import VllmTeacher, open_vllm_teacher
from tests.conftest import plain_forward
from tests.support.forwards import assert_matches, random_row
from tests.support.tiny_models import make_adapter, make_nested, make_tiny_lokilm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


async def test_an_adapter_is_scored_as_the_merged_model(
    vllm_teacher: VllmTeacher, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "tuned", tiny_llama, merged=tmp_path / "merged")
    forward = plain_forward(tmp_path / "merged")
    rows = [random_row(length) for length in (100, 1, 30, 65)]
    async with open_vllm_teacher(str(adapter), options={"dtype": "float32", "max_batch_tokens": 64}) as teacher:
        assert teacher.provenance.capture_path == "sampler"
        answers = await teacher.score(rows, Fields(k=64))
    for row, targets in zip(rows, answers, strict=True):
        assert_matches(targets, forward(row), row)
    of_base = vllm_teacher.identity
    assert teacher.identity.model == f"{of_base.model}+tuned"
    assert teacher.identity.weights_sha256 == of_base.weights_sha256
    assert len(teacher.identity.adapters) == 1
    assert teacher.identity.differences(of_base).startswith("adapters: ")


async def test_a_model_that_also_sees_is_scored_by_its_text_part(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    folder = make_nested(tmp_path / "nested")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    row = random_row(100)
    async with open_vllm_teacher(str(folder)) as teacher:
        [targets] = await teacher.score([row], Fields(k=64))
        assert (teacher.identity.vocab_size, teacher.identity.dtype) == (512, "float32")
        assert teacher.limits.max_row_tokens == 255
    with torch.no_grad():
        logits = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0]
    assert_matches(targets, logits.log_softmax(-1).numpy(), row)


async def test_a_lokilm_is_scored_as_by_transformers(tmp_path: Path) -> None:
    folder = make_tiny_lokilm(tmp_path / "loki", context=1024)
    forward = plain_forward(folder)
    rows = [random_row(length) for length in (300, 1, 65, 1000)]
    async with open_vllm_teacher(str(folder), options={"max_batch_tokens": 64}) as teacher:
        assert (teacher.provenance.capture_path, teacher.identity.dtype) == ("sampler", "float32")
        answers = await teacher.score(rows, Fields(k=64))
    for row, targets in zip(rows, answers, strict=True):
        assert_matches(targets, forward(row), row)
