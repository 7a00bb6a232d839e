"""Every capture path on real engines: against a plain forward, against each other, and when one of them is broken."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from potstill.cache import Cache
from potstill.cache.errors import TeacherFailed, UnsupportedField
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.types import Fields, Targets, Tokens
from potstill.teacher_service.engine.vllm_teacher import VllmOptions, VllmTeacher
from tests.conftest import Forward
from tests.support.forwards import TOLERANCE, VOCAB, assert_matches, random_row
from tests.support.tiny_models import make_tiny_llama

BROKEN_TOKEN = 13
"""Rows with it have NaN logits in `broken_llama`."""
EVERYTHING = Fields(k=64, draws=50, seed=3, entropy=True, temperatures=(0.5, 2.0, 3.0), dense=True)


def moved_draws(ours: Targets, theirs: Targets) -> int:
    """How many draws fell on another id."""
    counts = np.zeros((2, ours.num_positions, VOCAB), np.int64)
    for number, targets in zip(counts, (ours, theirs), strict=True):
        assert targets.draws is not None
        position = np.repeat(np.arange(len(number)), np.diff(targets.draws.offsets))
        number[position, targets.draws.ids] = targets.draws.counts
    return int(np.abs(counts[0] - counts[1]).sum()) // 2


def assert_same(ours: Targets, theirs: Targets) -> None:
    """The top-k of one row by two paths, up to float noise and ties."""
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    np.testing.assert_allclose(ours.label_logprob, theirs.label_logprob, atol=1e-4)
    np.testing.assert_allclose(np.exp(ours.log_tail), np.exp(theirs.log_tail), atol=1e-4)
    assert (ours.ids == theirs.ids).mean() > 0.999


async def test_every_field_equals_a_plain_forward_and_float64(vllm_teacher: VllmTeacher, tiny_forward: Forward) -> None:
    row = random_row(200)
    [targets] = await vllm_teacher.score([row], EVERYTHING)
    forward = tiny_forward(row)
    assert_matches(targets, forward, row)
    assert targets.dense is not None
    assert targets.entropy is not None
    assert targets.log_z is not None
    np.testing.assert_allclose(targets.dense, forward, atol=TOLERANCE)
    dense = targets.dense.astype(np.float64)
    np.testing.assert_allclose(targets.entropy, -(np.exp(dense) * dense).sum(axis=1), atol=1e-4)
    tempered = [np.logaddexp.reduce(dense / t, axis=1) for t in EVERYTHING.temperatures]
    np.testing.assert_allclose(targets.log_z, np.stack(tempered, axis=1), atol=1e-4)


async def test_draws_follow_the_plain_forwards_softmax(vllm_teacher: VllmTeacher, tiny_forward: Forward) -> None:
    """Chi-square of all draws of a row, with ids joined until each cell is expected ten times."""
    row = random_row(60, seed=4)
    [targets] = await vllm_teacher.score([row], Fields(k=0, draws=2000, seed=1))
    assert targets.draws is not None
    statistic, cells = 0.0, 0
    for position, expected in enumerate(2000 * np.exp(tiny_forward(row).astype(np.float64))):
        there = targets.draws[position : position + 1]
        seen = np.zeros(VOCAB)
        seen[there.ids] = there.counts
        cell = np.minimum((np.cumsum(expected) / 10).astype(int), 199)
        joined = [np.bincount(cell, weights=values)[np.unique(cell)] for values in (seen, expected)]
        found = stats.chisquare(joined[0], joined[1] * 2000 / joined[1].sum())
        statistic, cells = statistic + found.statistic, cells + len(joined[0]) - 1
    assert stats.chi2.sf(statistic, cells) > 1e-4


async def test_a_row_draws_the_same_in_other_batches_and_chunks(vllm_teacher: VllmTeacher) -> None:
    """Steps of 64 tokens: among others the row is cut elsewhere than alone."""
    row, want = random_row(150), Fields(k=8, draws=50, seed=9)
    [alone] = await vllm_teacher.score([row], want)
    [again] = await vllm_teacher.score([row], want)
    assert moved_draws(alone, again) == 0
    others = [random_row(37 + i, seed=i) for i in range(6)]
    *_, among = await vllm_teacher.score([*others, row], want)
    assert moved_draws(alone, among) <= 8, "of 7,500"
    [reseeded] = await vllm_teacher.score([row], Fields(k=8, draws=50, seed=10))
    assert moved_draws(alone, reseeded) > 1000


async def test_callers_with_other_wishes_share_a_step(vllm_teacher: VllmTeacher, tiny_forward: Forward) -> None:
    wishes = [
        Fields(k=0, draws=7),
        Fields(k=64),
        EVERYTHING,
        Fields(k=0, entropy=True),
        Fields(k=3, temperatures=(4.0,)),
    ]
    rows = [random_row(20 + i, seed=i) for i in range(len(wishes))]
    answers = await asyncio.gather(*(vllm_teacher.score([row], want) for row, want in zip(rows, wishes, strict=True)))
    for row, want, [targets] in zip(rows, wishes, answers, strict=True):
        assert (targets.num_positions, targets.k) == (len(row), want.k)
        if want.k:
            assert_matches(targets, tiny_forward(row), row)


@pytest.fixture(scope="module")
def broken_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One weight, read for one token only, is NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "broken-llama", seed=0)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN_TOKEN, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def broken_teacher(vllm_teacher: VllmTeacher, broken_llama: Path) -> Iterator[VllmTeacher]:
    """In a process of its own, because the session's engine is in this one."""
    teacher = asyncio.run(VllmTeacher.open(VllmOptions(model=str(broken_llama), dtype="float32", prefix_ids=(7,))))
    yield teacher
    asyncio.run(teacher.close())


def without_the_broken_token(row: Tokens) -> Tokens:
    return np.where(row == BROKEN_TOKEN, BROKEN_TOKEN + 1, row).astype(np.uint32)


@pytest.mark.parametrize("want", [Fields(k=8), EVERYTHING, Fields(k=0, draws=5)], ids=["top-k", "all", "draws"])
async def test_nan_logits_fail_their_row_only_and_are_never_cached(
    broken_teacher: VllmTeacher, tmp_path: Path, want: Fields
) -> None:
    good = without_the_broken_token(random_row(40))
    bad = good.copy()
    bad[20] = BROKEN_TOKEN
    cache = Cache.open(tmp_path / "c", mode="r+")
    policy = KeepPolicy(k=want.k) if want.only_top_k else KeepPolicy(k=64)
    async with CachedTeacher.open(broken_teacher, name="broken", cache=cache, policy=policy) as cached:
        for _ in range(2):
            failed, scored = await asyncio.gather(
                cached.score([bad], want), broken_teacher.score([good], want), return_exceptions=True
            )
            assert isinstance(failed, TeacherFailed), failed
            assert "not a number at position" in str(failed)
            assert isinstance(scored, list)
        assert cached.counters.hits == 0


async def test_an_engine_in_its_own_process_gives_every_field(
    vllm_teacher: VllmTeacher, broken_teacher: VllmTeacher, tiny_forward: Forward
) -> None:
    assert broken_teacher.provenance.capture_path == vllm_teacher.provenance.capture_path == "sampler"
    row = without_the_broken_token(random_row(100))
    prefixed = np.append(np.uint32(7), row)
    [theirs] = await broken_teacher.score([row], EVERYTHING)
    [ours] = await vllm_teacher.score([prefixed], EVERYTHING)
    assert_matches(theirs, tiny_forward(prefixed)[1:], row)
    for name in ("entropy", "log_z", "dense"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name)[1:], atol=TOLERANCE)
    assert theirs.draws is not None
    assert (np.add.reduceat(theirs.draws.counts.astype(np.int64), theirs.draws.offsets[:-1]) == EVERYTHING.draws).all()


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["arrays", "public-flat"])
async def test_a_teacher_captures_by_the_path_it_is_told(
    vllm_teacher: VllmTeacher, tiny_llama: Path, capture: Literal["arrays", "public-flat"]
) -> None:
    """In its own process; each path must give what the session's `sampler` gives."""
    rows = [random_row(length) for length in (1, 2, 64, 200)]
    options = VllmOptions(model=str(tiny_llama), dtype="float32", capture=capture, max_batch_tokens=64)
    other = await VllmTeacher.open(options)
    try:
        assert other.provenance.capture_path == capture
        ours, theirs = await asyncio.gather(*(t.score(rows, Fields(k=64)) for t in (vllm_teacher, other)))
        for mine, its in zip(ours, theirs, strict=True):
            assert_same(mine, its)
        with pytest.raises(UnsupportedField, match=f"{capture}.*top-k only.*entropy is not there") as refused:
            await other.score(rows, Fields(k=4, entropy=True))
        assert "\n" not in str(refused.value)
    finally:
        await other.close()


SABOTAGE = """
import asyncio, inspect, json, sys, textwrap
from potstill.teacher_service.engine.vllm_engine import _import_vllm
_import_vllm()
import vllm.v1.engine.logprobs as logprobs
import vllm.v1.sample.sampler as sampler
import vllm.v1.worker.gpu_model_runner as runner

def rename(module, owner, caller, name):
    setattr(owner, name + "_renamed", getattr(owner, name))
    delattr(owner, name)
    source = textwrap.dedent(inspect.getsource(getattr(owner, caller))).replace(name, name + "_renamed")
    found = {}
    exec(source, vars(module), found)
    setattr(owner, caller, found[caller])

def same(): pass
def receiver(): rename(logprobs, logprobs.LogprobsProcessor, "update_from_output", "_update_prompt_logprobs")
def step(): rename(runner, runner.GPUModelRunner, "_bookkeeping_sync", "_get_prompt_logprobs_dict")
def numbers():
    sampler.Sampler.compute_logprobs = staticmethod(lambda logits: (logits / 2).log_softmax(dim=-1))
def reader():
    from potstill.teacher_service.engine.vllm_engine import VllmEngine
    build = VllmEngine._build
    def build_while_another_thread_reads(*arguments, **more):
        import numba
        return build(*arguments, **more)
    VllmEngine._build = build_while_another_thread_reads

async def main(folder, sabotage, capture):
    import numpy as np
    from potstill.cache.errors import UnsupportedField
    from potstill.cache.types import Fields
    from potstill.teacher_service.engine.vllm_teacher import VllmOptions, VllmTeacher
    globals()[sabotage]()
    options = VllmOptions(model=folder, dtype="float32", capture=capture, max_batch_tokens=64)
    teacher = await VllmTeacher.open(options)
    [targets] = await teacher.score([np.arange(100, dtype=np.uint32)], Fields(k=8))
    try:
        await teacher.score([np.arange(3, dtype=np.uint32)], Fields(k=8, entropy=True))
        refusal = ""
    except UnsupportedField as error:
        refusal = str(error)
    print(json.dumps({
        "path": teacher.provenance.capture_path, "refusal": refusal,
        "ids": targets.ids.tolist(), "logprobs": targets.logprobs.tolist(),
    }))
    await teacher.close()

asyncio.run(main(*sys.argv[1:]))
"""


def sabotaged(folder: Path, sabotage: str, capture: str = "auto") -> tuple[dict[str, Any], str]:
    """What a teacher in its own interpreter answers, and its log, with a part of vLLM changed before it starts."""
    command = [sys.executable, "-c", SABOTAGE, str(folder), sabotage, capture]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "capture", "path", "reason"),
    [
        ("same", "auto", "sampler", ""),
        ("same", "arrays", "arrays", ""),
        ("same", "public-flat", "public-flat", ""),
        ("step", "sampler", "arrays", "CPUModelRunner has no _get_prompt_logprobs_dict"),
        ("receiver", "auto", "public-flat", "TeacherFailed"),
        ("numbers", "sampler", "arrays", "logprobs differ from the public path's"),
    ],
)
def test_a_seam_that_has_moved_is_passed_over_and_said_so(
    tiny_llama: Path, tiny_forward: Forward, sabotage: str, capture: str, path: str, reason: str
) -> None:
    answer, log = sabotaged(tiny_llama, sabotage, capture)
    assert answer["path"] == path
    if path == "sampler":
        assert not answer["refusal"]
    else:
        assert reason in answer["refusal"]
        assert reason in log
    if reason:
        assert log.count("targets are not captured by the path 'sampler'") == 1
    if sabotage != "numbers":
        dense = tiny_forward(np.arange(100, dtype=np.uint32))
        theirs = np.take_along_axis(dense, np.array(answer["ids"]), axis=1)
        np.testing.assert_allclose(answer["logprobs"], theirs, atol=TOLERANCE)


@pytest.mark.slow
def test_numba_may_be_loaded_while_an_engine_starts(tiny_llama: Path, tiny_forward: Forward) -> None:
    answer, log = sabotaged(tiny_llama, "reader")
    assert (answer["path"], log) == ("sampler", "")
    theirs = np.take_along_axis(tiny_forward(np.arange(100, dtype=np.uint32)), np.array(answer["ids"]), axis=1)
    np.testing.assert_allclose(answer["logprobs"], theirs, atol=TOLERANCE)
