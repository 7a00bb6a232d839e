"""A run on Ray with two workers, whose cache is behind a service that is killed: it waits, saves, and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from potstill.student_trainer.metrics.records import read_metrics
from tests.support.fakes import FakeTeacher
from tests.support.processes.serve_process import Serving
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import write_cache
from tests.support.waiting import until

PATIENCE = 6
STEPS = 60
CONFIG = """
[data]
cache = "{cache}"
corpus = "docs"
held_out = 8
prefetch = 1
patience = {patience}
[[teachers]]
name = "fake"
[student.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 32
[train]
out = "{out}"
steps = {steps}
batch_rows = 8
micro_batch_rows = 2
workers = 2
checkpoint_every = 1000
eval_every = 1000
"""


@contextmanager
def training(folder: Path, cache: str, out: str) -> Iterator[subprocess.Popen[str]]:
    """A `potstill train` of the run `out`."""
    config = folder / f"{out}.toml"
    config.write_text(CONFIG.format(cache=cache, out=folder / out, steps=STEPS, patience=PATIENCE))
    command = [sys.executable, "-m", "potstill.clients.cli", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.slow
def test_workers_save_a_checkpoint_when_the_service_was_killed_and_go_on_with_another(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    with training(tmp_path, str(root), "straight") as straight:
        errors = straight.communicate()[1]
        assert straight.returncode == 0, errors
    with serving_teachers(hosted("other", FakeTeacher())) as behind:
        service = Serving("--cache", str(root), "--teacher", f"other={behind}")
        with training(tmp_path, service.url, "killed") as run:
            until(lambda: len(read_metrics(tmp_path / "killed")) > 3)
            service.stop(signal.SIGKILL)
            _, told = run.communicate()
        assert run.returncode == 1, told
        assert f"no answer for {PATIENCE} s" in told
        assert "a checkpoint of step " in told
        states = [json.loads(file.read_text()) for file in (tmp_path / "killed").glob("checkpoints/step-*/state.json")]
        assert 3 <= states[-1]["step"] < STEPS
        another = Serving("--cache", str(root), "--teacher", f"other={behind}")
        with training(tmp_path, another.url, "killed") as run:
            out, err = run.communicate()
        assert run.returncode == 0, err
        assert f"resuming from step {states[-1]['step']}" in out
        another.stop()
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "straight"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
