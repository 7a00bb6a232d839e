"""The loop under torchrun: two processes on gloo, whose student is shared among them, train like one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.paths import ROOT
from tests.support.tiny_runs import STUDENT, config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def torchrun(root: Path, out: Path, workers: int, **changes: Any) -> subprocess.CompletedProcess[str]:
    value = config_of(root, out, **changes).model_dump(mode="json", exclude_none=True)
    file = out.with_suffix(".toml")
    file.write_text("".join(f"{section} = {inline(found)}\n" for section, found in value.items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    module = ["-m", "potstill.student_trainer.launch.torchrun", str(file)]
    return subprocess.run([*command, *module], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def inline(value: Any) -> str:
    """A value of TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(inline, value))}]" if isinstance(value, list) else json.dumps(value)


def numbers(run: Path, name: str) -> list[float]:
    return [record[name] for record in read_metrics(run) if name in record]


@pytest.mark.slow
def test_two_that_share_a_student_train_like_one_and_one_goes_on(root: Path, tmp_path: Path) -> None:
    # Tied weights, held-out rows that two workers cannot share evenly, and a stop between two checkpoints.
    student = {"config": {**STUDENT, "num_hidden_layers": 2, "tie_word_embeddings": True}}
    same = {"student": student, "data": {"held_out": 7}}
    loop = {"parallel": "fsdp", "activation_checkpointing": True, "steps": 6, "schedule_steps": 10}
    done = torchrun(root, tmp_path / "two", 2, **same, train=loop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("training with 2 workers of torchrun\n")
    assert done.stdout.endswith(f"model: {tmp_path / 'two' / 'model'}\n")
    train(config_of(root, tmp_path / "two", **same, train={"schedule_steps": 10}))
    alone = train(config_of(root, tmp_path / "alone", **same))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            numbers(tmp_path / "two", name), numbers(tmp_path / "alone", name), atol=1e-4, rtol=1e-4, err_msg=name
        )
    ours, theirs = (
        [record["held_out"]["ce"] for record in read_metrics(tmp_path / run) if "held_out" in record]
        for run in ("two", "alone")
    )
    assert ours[:2] == pytest.approx(theirs[:2], abs=1e-4)
    assert alone.held_out is not None
    two, one = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "alone"))
    assert two.keys() == one.keys()
    assert all(torch.allclose(two[name], one[name], atol=1e-3) for name in one)


@pytest.mark.slow
def test_a_run_of_one_goes_on_as_two_that_share_the_student(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "run", train={"steps": 5, "schedule_steps": 10}))
    done = torchrun(root, tmp_path / "run", 2, train={"parallel": "fsdp", "schedule_steps": 10})
    assert done.returncode == 0, done.stderr
    train(config_of(root, tmp_path / "alone", train={"schedule_steps": 10}))
    np.testing.assert_allclose(
        numbers(tmp_path / "run", "loss"), numbers(tmp_path / "alone", "loss"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_three_that_cannot_share_rows_evenly_train_like_one(root: Path, tmp_path: Path, parallel: str) -> None:
    done = torchrun(root, tmp_path / "three", 3, train={"parallel": parallel, "micro_batch_rows": 1})
    assert done.returncode == 0, done.stderr
    train(config_of(root, tmp_path / "alone"))
    np.testing.assert_allclose(
        numbers(tmp_path / "three", "loss"), numbers(tmp_path / "alone", "loss"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_an_error_of_the_user_is_one_line_of_a_worker(root: Path, tmp_path: Path) -> None:
    done = torchrun(root, tmp_path / "bad", 2, train={"device": "gpu"})
    assert done.returncode == 1
    assert 'invalid_input: train.device is "gpu", but torch finds none here' in done.stderr
