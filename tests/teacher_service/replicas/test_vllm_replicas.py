"""The pool of one engine, which is a real one of vLLM: what becomes of calls when it dies or is wedged."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Fields
from potstill.cache.entry_points import open_teacher
from potstill.cache.types import JSON
from potstill.teacher_service.engine.vllm_teacher import VllmTeacher
from potstill.teacher_service.replicas.pool import LocalPool, Watch
from tests.support.contracts import rows


def engine_processes() -> set[int]:
    """vLLM's engines that this process has started in processes of their own."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"EngineCore" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue  # gone meanwhile
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_real_engine_is_replaced(vllm_teacher: VllmTeacher, tiny_llama: Path, number: signal.Signals) -> None:
    before = engine_processes()
    options: dict[str, JSON] = {"dtype": "float32", "max_batch_tokens": 64}
    opens_vllm = partial(open_teacher, str(tiny_llama), options=options)
    async with LocalPool.open(opens_vllm, Watch(wedged_seconds=10.0, check_seconds=0.2)) as pool:
        asked = rows(30, 120, 7)
        await pool.score(asked, Fields(k=4))
        (engine,) = engine_processes() - before
        os.kill(engine, number)
        answers = await pool.score(asked, Fields(k=4))
        assert engine not in engine_processes()
        for answer, expected in zip(answers, await vllm_teacher.score(asked, Fields(k=4)), strict=True):
            np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-4)
    assert engine_processes() == before
