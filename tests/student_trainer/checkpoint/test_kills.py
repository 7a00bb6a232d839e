"""Workers that are killed inside a save, and as many others that go on: rows and losses are those of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from potstill.student_trainer.checkpoint.folders import newest_checkpoint, step_of
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.run import evaluate_run
from tests.support.processes.training_workers import Point, train_alone, train_together
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS = 12
PARTIAL = ".partial-step-"
BEFORE_DATA = ("os.mkdir", PARTIAL, "")
STATE = ("open", PARTIAL, "/state.json")
RENAME = ("os.rename", PARTIAL, "")
MARKER, MARKED = ("open", "step-", ".partial-.complete"), ("os.rename", "step-", ".partial-.complete")
OLD_MARK, OLD = ("os.remove", "step-", ".complete"), ("shutil.rmtree", "step-", "")
WHOLE: list[tuple[int, int, Point]] = [
    (2, 0, BEFORE_DATA),
    (2, 0, ("open", PARTIAL, "/optimizer.pt")),
    (2, 0, OLD_MARK),
    (1, 0, STATE),
    (1, 0, RENAME),
    (1, 0, OLD),
    (3, 0, MARKER),
    (3, 0, MARKED),
]
SHARDED: list[tuple[int, int, Point]] = [
    (2, 0, BEFORE_DATA),
    (2, 1, ("open", PARTIAL, ".safetensors")),
    (2, 0, OLD_MARK),
    (1, 0, STATE),
    (1, 0, RENAME),
    (1, 0, OLD),
    (3, 2, ("open", PARTIAL, ".safetensors")),
    (3, 0, ("os.mkdir", PARTIAL, "/model")),
    (3, 0, MARKER),
    (3, 0, MARKED),
]
"""Workers, the one that is killed, and where; the runs follow each other."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def config(root: Path, out: Path, parallel: str = "ddp") -> TrainConfig:
    """Seven rows a step, which neither two nor three workers share evenly."""
    loop = {"batch_rows": 7, "micro_batch_rows": 2, "steps": STEPS, "eval_every": 6, "checkpoint_every": 3}
    return config_of(root, out, train={**loop, "keep_checkpoints": 1, "parallel": parallel})


def consumed(folder: Path) -> Iterator[list[str]]:
    """Rows of each step that all workers of a session consumed."""
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("rank-*.jsonl")]
    for parts in zip(*ranks, strict=False):
        yield sorted(row for part in parts for row in part)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_one_and_three_workers_that_are_killed_inside_a_save_train_like_one_run(
    root: Path, tmp_path: Path, parallel: str
) -> None:
    train_alone(config(root, tmp_path / "alone"), tmp_path / "rank-0.jsonl")
    expected, seen = list(consumed(tmp_path)), set[int]()
    assert [len(rows) for rows in expected] == [7] * STEPS
    asked = config(root, tmp_path / "run", parallel)
    kills = WHOLE if parallel == "ddp" else SHARDED
    for number, (size, victim, point) in enumerate([*kills, (3, 0, None)]):
        begun = max(step_of(newest_checkpoint(asked.run_dir / "checkpoints")), 0)
        session = tmp_path / f"session-{number}"
        codes = train_together(asked, size, session, point=point, victim=victim)
        assert None not in codes, f"{point}: a worker went on for a minute"
        assert codes[victim] == (0 if point is None else -9), point
        for step, rows in enumerate(consumed(session), begun):
            assert rows == expected[step], (point, step)
            seen.add(step)
    assert seen == set(range(STEPS))
    ours, theirs = ([one for one in read_metrics(tmp_path / run) if "loss" in one] for run in ("run", "alone"))
    for name in ("step", "loss", "grad_norm"):
        np.testing.assert_allclose([one[name] for one in ours], [one[name] for one in theirs], rtol=1e-4, err_msg=name)
    found, wanted = (evaluate_run(tmp_path / run)[""].ce for run in ("run", "alone"))
    assert found == pytest.approx(wanted, abs=1e-4)
