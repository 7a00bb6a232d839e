"""The check for a GPU, run in small on the CPU: its own code, and nothing about its times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from potstill.student_trainer.losses import LOSSES
from tests.support.paths import ROOT


@pytest.mark.slow
def test_it_runs_in_small_and_its_gradients_are_right() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["gradients"]) == set(LOSSES)
    for errors in report["gradients"].values():
        assert errors["float32"] < 1e-5
        assert errors["bfloat16"] < 1e-2
