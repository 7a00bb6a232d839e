"""A run on a real cluster whose nodes are smaller than all CPUs by all workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.paths import ROOT
from tests.support.tiny_runs import config_of, write_cache


def told(root: Path, out: Path, workers: int) -> dict[str, object]:
    """Run in a process of its own: this one may have another Ray."""
    command = [sys.executable, "-m", "tests.support.processes.three_nodes", str(root), str(out), str(workers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_workers_are_placed_on_small_nodes_or_refused_in_one_line(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    # 4 CPUs for 2 workers: with 2 CPUs each there would be place for one, and Ray would wait for ever.
    assert told(root, tmp_path / "two", 2) == {"step": 3}
    refused = str(told(root, tmp_path / "five", 5)["error"])
    assert refused.startswith("5 workers cannot be placed on 3 nodes (")


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers_when_a_node_is_gone(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    command = [sys.executable, "-m", "tests.support.processes.elastic_nodes", str(root), str(tmp_path / "elastic")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    # Two of at most three had a place when the node was taken away.
    assert json.loads(done.stdout.splitlines()[-1]) == {"step": 60, "busy": [2]}
    loop = {"steps": 60, "eval_every": 30, "checkpoint_every": 10}
    train(config_of(root, tmp_path / "alone", train=loop))
    ours, theirs = (
        [record["loss"] for record in read_metrics(tmp_path / run) if "loss" in record] for run in ("elastic", "alone")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_node_that_is_to_be_taken_away_makes_a_checkpoint(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    command = [sys.executable, "-m", "tests.support.processes.leaving_node", str(root), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"finished": False, "saved": True, "further": True}
