"""The gap between training and held-out loss, and the warning of a student that learns its rows by heart."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from potstill.student_trainer.metrics.overfitting import OverfittingWatch
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, without_times, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def step(number: int, ce: float, epoch: Any = 0) -> dict[str, Any]:
    return {"step": number, "loss": 2 * ce, "ce": ce, "epoch": epoch}


def evaluation(number: int, ce: float | None) -> dict[str, Any]:
    return {"step": number, "held_out": {"ce": ce}}


def test_the_gap_is_to_the_mean_of_the_steps_since_the_evaluation_before() -> None:
    watch = OverfittingWatch([step(1, 9.0), evaluation(1, 8.0), step(2, 4.0)])
    assert watch.follow(step(3, 5.0)) == step(3, 5.0)
    assert watch.follow(evaluation(3, 4.75)) == {**evaluation(3, 4.75), "train_ce": 4.5, "gap": 0.25}
    assert watch.follow(evaluation(3, 4.75)) == evaluation(3, 4.75), "no step was taken since"


def test_evaluations_of_other_corpora_and_of_rows_without_labels_have_no_gap() -> None:
    watch = OverfittingWatch([step(1, 9.0)])
    for record in ({"step": 1, "evaluations": {"wiki": {"ce": 1.0}}}, evaluation(1, None)):
        assert watch.follow(record) == record


@pytest.mark.parametrize("epoch", [1, {"books": 0, "wiki": 1}])
def test_three_worse_evaluations_of_repeated_rows_are_one_warning(epoch: Any, caplog: pytest.LogCaptureFixture) -> None:
    watch = OverfittingWatch([step(1, 6.0), evaluation(1, 5.0)])
    for number, ce in ((2, 5.1), (3, 5.2), (4, 5.1), (5, 5.3), (6, 5.4)):
        watch.follow(step(number, 1.0, epoch))
        watch.follow(evaluation(number, ce))
        assert bool(caplog.messages) == (number >= 4)
    [told] = caplog.messages
    assert told == (
        "held-out cross-entropy was 5.0000 at step 1, and higher in the 3 evaluations since, while rows come again "
        "(epoch 1): the student learns them by heart; take fewer train.steps, or more text"
    )


@pytest.mark.parametrize(("epoch", "losses"), [(0, (5.1, 5.2, 5.3)), (1, (5.1, 5.2, 4.9, 5.0, 5.1))])
def test_rows_that_never_came_before_and_a_new_best_one_are_no_warning(
    epoch: int, losses: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    watch = OverfittingWatch([step(1, 6.0), evaluation(1, 5.0)])
    for number, ce in enumerate(losses, 2):
        watch.follow(step(number, 1.0, epoch))
        watch.follow(evaluation(number, ce))
    assert not caplog.messages


def test_a_run_that_was_stopped_tells_the_gap_of_a_straight_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_cache(tmp_path)
    loop = {"steps": 6, "eval_every": 3, "checkpoint_every": 2, "schedule_steps": 6}
    straight, cut = (config_of(root, tmp_path / name, train=loop) for name in ("straight", "cut"))
    train(straight)
    steps = iter([False, True])
    assert not train(cut, should_stop=lambda: next(steps)).finished
    with caplog.at_level(logging.ERROR):
        train(cut)
    records = read_metrics(cut.run_dir)
    assert without_times(records) == without_times(read_metrics(straight.run_dir))
    gaps = [record for record in records if "gap" in record]
    assert [record["step"] for record in gaps] == [3, 6]
    losses = [record["ce"] for record in records if "loss" in record and record["step"] > 3]
    assert gaps[1]["train_ce"] == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert json.dumps(gaps[1])
