"""The learning rate over a run, and over one that goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.optimizer import learning_rate
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 0.55]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    steps = {"steps": 10, "warmup": 2, "lr": 1.0, "min_lr": 0.1, "decay": 0.2, "schedule": schedule}
    config = config_of(Path("/cache"), Path("/run"), train=steps).train
    found = [learning_rate(step, config) for step in (0, 1, 2, 4, 6, 8)]
    if schedule == "wsd":
        found[-1] = learning_rate(9, config)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_schedule_may_be_longer_or_shorter_than_the_run(schedule: str) -> None:
    def rates(**lengths: int) -> list[float]:
        config = config_of(Path("/c"), Path("/r"), train={"schedule": schedule, "min_lr": 1e-3, **lengths}).train
        return [learning_rate(step, config) for step in range(config.steps)]

    assert rates(steps=5, schedule_steps=10) == rates(steps=10)[:5]
    assert rates(steps=15, schedule_steps=10)[:10] == rates(steps=10)
    assert rates(steps=15, schedule_steps=10)[10:] == [1e-3] * 5


def rates_of(run: Path) -> list[float]:
    return [record["lr"] for record in read_metrics(run) if "lr" in record]


def test_a_jump_of_the_rate_is_told(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "potstill.student_trainer")
    train(config_of(root, tmp_path / "run", train={"steps": 6}))
    assert caplog.messages == []
    train(config_of(root, tmp_path / "run", train={"steps": 12}))
    rates = rates_of(tmp_path / "run")
    told = f"the learning rate jumps from {rates[5]:.3g} to {rates[6]:.3g} at step 7"
    lengths = "the cosine schedule was of 6 steps and is of 12 steps; train.schedule_steps keeps its length"
    assert caplog.messages == [f"{told}: {lengths}"]
    assert rates[6] > 3 * rates[5]


@pytest.mark.parametrize(
    "longer",
    [{"steps": 6, "schedule_steps": 6}, pytest.param({"steps": 6, "schedule": "constant"}, marks=pytest.mark.slow)],
)
def test_a_planned_extension_has_no_jump(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, longer: dict[str, object]
) -> None:
    caplog.set_level(logging.WARNING, "potstill.student_trainer")
    train(config_of(root, tmp_path / "run", train={**longer, "steps": 3}))
    train(config_of(root, tmp_path / "run", train=longer))
    train(config_of(root, tmp_path / "straight", train=longer))
    assert rates_of(tmp_path / "run") == rates_of(tmp_path / "straight")
    assert caplog.messages == []
