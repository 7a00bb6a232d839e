"""The real vLLM on tiny random models, against a plain transformers forward."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache.corpus.tokenizer import fingerprint, load_tokenizer
from potstill.cache.errors import InvalidInput, LimitExceeded, TeacherFailed, Unavailable
from potstill.cache.types import JSON, Fields, TeacherLimits
from potstill.teacher_service.engine.vllm_teacher import VllmOptions, VllmTeacher, open_vllm_teacher
from tests.conftest import Forward, plain_forward
from tests.support.forwards import TOLERANCE, VOCAB, assert_matches, random_row
from tests.support.tiny_models import make_tiny_llama

PREFIX = (7, 300)


def test_importing_the_module_imports_no_engine() -> None:
    code = "import sys, potstill.teacher_service.engine.vllm_teacher; print({'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_an_engine_starts_and_ends_without_a_warning(tiny_llama: Path) -> None:
    code = (
        "import asyncio\n"
        "from potstill.teacher_service.engine.vllm_teacher import open_vllm_teacher\n"
        "async def main():\n"
        f"    async with open_vllm_teacher({str(tiny_llama)!r}):\n"
        "        pass\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200, 255])
async def test_every_position_equals_a_plain_forward(
    vllm_teacher: VllmTeacher, tiny_forward: Forward, length: int
) -> None:
    row = random_row(length)
    [targets] = await vllm_teacher.score([row], Fields(k=64))
    assert_matches(targets, tiny_forward(row), row)


async def test_the_last_target_is_that_of_the_longer_row(vllm_teacher: VllmTeacher) -> None:
    row = random_row(90)
    [short, long] = await vllm_teacher.score([row[:-1], row], Fields(k=64))
    np.testing.assert_array_equal(short.ids[-1], long.ids[-2])
    np.testing.assert_allclose(short.logprobs[-1], long.logprobs[-2], atol=TOLERANCE)
    np.testing.assert_allclose(short.log_tail[-1], long.log_tail[-2], atol=TOLERANCE)
    assert np.isnan(short.label_logprob[-1])
    assert np.isfinite(long.label_logprob[-2])


async def test_many_callers_at_once_each_get_their_own(vllm_teacher: VllmTeacher, tiny_forward: Forward) -> None:
    async def one(caller: int) -> None:
        rows = [random_row(1 + (37 * caller + 11 * i) % 200, seed=caller) for i in range(1 + caller % 4)]
        k = (1, 8, 64, 200)[caller % 4]
        answers = await vllm_teacher.score(rows, Fields(k=k))
        assert [answer.k for answer in answers] == [k] * len(rows)
        for row, targets in zip(rows, answers, strict=True):
            assert_matches(targets, tiny_forward(row), row)

    await asyncio.gather(*(one(caller) for caller in range(20)))


async def test_a_cancelled_caller_fails_nobody_else(vllm_teacher: VllmTeacher, tiny_forward: Forward) -> None:
    rows = [random_row(250, seed=i) for i in range(40)]
    cancelled = asyncio.ensure_future(vllm_teacher.score(rows, Fields(k=64)))
    kept = asyncio.ensure_future(vllm_teacher.score([random_row(100)], Fields(k=64)))
    await asyncio.sleep(0.02)
    assert not cancelled.done(), "too fast to cancel: give it more rows"
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    [targets] = await kept
    assert_matches(targets, tiny_forward(random_row(100)), random_row(100))
    assert (await vllm_teacher.score([random_row(3)], Fields(k=4)))[0].num_positions == 3


async def test_no_rows_are_no_answers(vllm_teacher: VllmTeacher) -> None:
    assert await vllm_teacher.score([], Fields()) == []


@pytest.mark.parametrize(
    ("row", "want", "error", "message"),
    [
        (np.zeros(0, np.uint32), Fields(k=4), InvalidInput, "row 1 is empty"),
        (np.zeros((2, 2), np.uint32), Fields(k=4), InvalidInput, "row 1 is uint32 of 2 dimensions"),
        (np.zeros(3), Fields(k=4), InvalidInput, "row 1 is float64"),
        (np.array([1, 512], np.uint32), Fields(k=4), LimitExceeded, "row 1 has the token id 512, .* of 512"),
        (np.array([1, -1]), Fields(k=4), LimitExceeded, "row 1 has the token id -1"),
        (np.zeros(256, np.uint32), Fields(k=4), LimitExceeded, "256 tokens, .* 255; .*--row-tokens 255"),
        (np.zeros(3, np.uint32), Fields(k=257), LimitExceeded, "k=257 is over .* 256"),
        (np.zeros(3, np.uint32), Fields(k=4, temperatures=(2.0,) * 17), LimitExceeded, "17 temperatures .* 16"),
        (
            np.zeros(3, np.uint32),
            Fields(temperatures=(2.0, 1e-39)),
            LimitExceeded,
            r"temperature 1e-39 .*\[0.001, 1000",
        ),
        (np.zeros(3, np.uint32), Fields(temperatures=(1e4,)), LimitExceeded, r"temperature 10000.0 .*\[0.001, 1000"),
    ],
)
async def test_bad_input_is_refused_before_the_engine_sees_it(
    vllm_teacher: VllmTeacher, row: Any, want: Fields, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        await vllm_teacher.score([random_row(3), row], want)
    assert type(caught.value) is error
    assert (await vllm_teacher.score([random_row(3)], Fields(k=4)))[0].k == 4


def test_identity_names_the_model_and_no_path(vllm_teacher: VllmTeacher, tiny_llama: Path) -> None:
    identity = vllm_teacher.identity
    assert identity.model == "tiny-llama"
    assert str(tiny_llama.parent) not in str(identity)
    assert (identity.vocab_size, identity.dtype, identity.head_dtype) == (VOCAB, "float32", "float32")
    assert identity.tokenizer_sha256 == fingerprint(load_tokenizer(tiny_llama))
    assert len(identity.weights_sha256) == 64
    assert vllm_teacher.limits.max_row_tokens == 255
    provenance = vllm_teacher.provenance
    assert (provenance.engine, provenance.device, provenance.capture_path) == ("vllm", "cpu", "sampler")


@pytest.mark.slow
async def test_another_teacher_in_the_same_process(
    vllm_teacher: VllmTeacher, tiny_forward: Forward, tmp_path: Path
) -> None:
    before = set(multiprocessing.active_children())
    folder = make_tiny_llama(tmp_path / "other", seed=1)
    options: dict[str, JSON] = {
        "dtype": "float32",
        "prefix_ids": list(PREFIX),
        "max_row_tokens": 100,
        "max_top_k": 1000,
    }
    rows = [random_row(length) for length in (1, 2, 77, 100)]
    async with open_vllm_teacher(str(folder), options=options) as other:
        assert len(set(multiprocessing.active_children()) - before) == 1
        assert other.identity.prefix_ids == PREFIX
        assert other.identity.weights_sha256 != vllm_teacher.identity.weights_sha256
        assert other.limits == TeacherLimits(max_top_k=VOCAB, max_row_tokens=100)
        ours, theirs = await asyncio.gather(vllm_teacher.score(rows, Fields(k=64)), other.score(rows, Fields(k=VOCAB)))
        with pytest.raises(LimitExceeded, match="101 tokens"):
            await other.score([random_row(101)], Fields(k=4))
        in_flight = asyncio.ensure_future(other.score(rows * 100, Fields(k=VOCAB)))
        await asyncio.sleep(0.02)
    other_forward = plain_forward(folder)
    for row, mine, prefixed in zip(rows, ours, theirs, strict=True):
        assert_matches(mine, tiny_forward(row), row)
        dense = other_forward(np.concatenate([np.array(PREFIX, np.uint32), row]))
        assert_matches(prefixed, dense[len(PREFIX) :], row)
        assert np.isneginf(prefixed.log_tail).all()

    with pytest.raises(Unavailable, match="closed"):
        await in_flight
    with pytest.raises(Unavailable, match="closed"):
        await other.score(rows, Fields(k=4))
    await other.close()
    assert set(multiprocessing.active_children()) == before
    [targets] = await vllm_teacher.score(rows[-1:], Fields(k=64))
    assert_matches(targets, tiny_forward(rows[-1]), rows[-1])


@pytest.mark.slow
async def test_a_killed_engine_fails_its_waiters_and_later_calls(vllm_teacher: VllmTeacher, tiny_llama: Path) -> None:
    before = set(multiprocessing.active_children())
    teacher = await VllmTeacher.open(VllmOptions(model=str(tiny_llama), dtype="float32", max_batch_tokens=64))
    steps = teacher.progress
    await teacher.score([random_row(250)], Fields(k=4))
    assert teacher.progress - steps >= 4, "a long row in another process is seen to move while it is scored"
    [process] = set(multiprocessing.active_children()) - before
    waiting = asyncio.ensure_future(teacher.score([random_row(250, seed=i) for i in range(200)], Fields(k=200)))
    await asyncio.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(TeacherFailed, match="the engine of 'tiny-llama' failed"):
        await waiting
    with pytest.raises(TeacherFailed, match="the engine of 'tiny-llama' failed"):
        await teacher.score([random_row(3)], Fields(k=4))
    await teacher.close()
    assert (await vllm_teacher.score([random_row(3)], Fields(k=4)))[0].k == 4


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("/no/such/folder", {}, "there is no model folder '/no/such/folder'"),
        ("./nowhere", {}, "there is no model folder './nowhere'"),
        ("", {}, "model is empty"),
        ("m", {"dtpye": "float32"}, "no option 'dtpye'; known are base, revision, dtype, max_top_k"),
        ("m", {"model": "n"}, "no option 'model'"),
        ("m", {"max_top_k": "64"}, "max_top_k is '64': Input should be a valid integer"),
        ("m", {"max_top_k": 0}, "max_top_k is 0: Input should be greater than or equal to 1"),
        ("m", {"prefix_ids": [1, -2]}, "prefix_ids is -2: Input should be greater than or equal to 0"),
        ("m", {"prefix_ids": 1}, r"prefix_ids is 1: Input should be a valid tuple; write prefix_ids=\[1\]$"),
        ("m", {"dtype": "bflaot16"}, "dtype is 'bflaot16': Input should be 'auto', 'half', 'float16', 'bfloat16', 'fl"),
    ],
)
async def test_bad_options_are_refused_at_once(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        async with open_vllm_teacher(spec, options=options):
            pass


async def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no model folder: it has no config\.json"):
        await VllmTeacher.open(VllmOptions(model=str(tmp_path)))


async def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="has no weights"):
        await VllmTeacher.open(VllmOptions(model=str(tmp_path)))


async def test_a_hub_name_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InvalidInput, match="'nobody/nothing' is no model folder, and config.json of .* cannot be had from"
    ):
        await VllmTeacher.open(VllmOptions(model="nobody/nothing"))


async def test_what_vllm_refuses_is_bad_input(vllm_teacher: VllmTeacher, tiny_llama: Path) -> None:
    options = VllmOptions(model=str(tiny_llama), dtype="float32", max_row_tokens=1000)
    with pytest.raises(InvalidInput, match=r"vLLM does not take 'tiny-llama': .*\(1001\)"):
        await VllmTeacher.open(options)
