"""Runs with W&B and MLflow, as stand-ins with the calls of the two packages, which are not installed here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


class FakeWandb:
    """`wandb`, as far as it is called."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.step_metrics: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **settings: Any) -> FakeWandb:
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.step_metrics.append((name, step_metric))

    def log(self, data: dict[str, float]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished += 1


class FakeMlflowError(Exception):
    """`mlflow.exceptions.MlflowException`."""


class FakeMlflow:
    """`mlflow`, as far as it is called."""

    exceptions = SimpleNamespace(MlflowException=FakeMlflowError)

    def __init__(self, *, down_at: int = -1) -> None:
        self.begun: list[tuple[str | None, str]] = []
        self.params: list[dict[str, str]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.ended, self._down_at = 0, down_at

    def start_run(self, *, run_id: str | None, run_name: str) -> Any:
        self.begun.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "abc"))

    def log_params(self, params: dict[str, str]) -> None:
        self.params.append(params)

    def log_metrics(self, metrics: dict[str, float], *, step: int) -> None:
        if step == self._down_at:
            raise FakeMlflowError("no answer")
        self.logged[step] = {**self.logged.get(step, {}), **metrics}

    def end_run(self) -> None:
        self.ended += 1


def test_both_get_the_numbers_and_find_a_run_that_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    loop = {"trackers": ["wandb", "mlflow"], "schedule": "constant"}
    for steps in (2, 3):
        train(config_of(root, tmp_path / "run", train={**loop, "steps": steps}))
    records = read_metrics(tmp_path / "run")
    of_steps = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert {one["step"]: one["loss"] for one in wandb.logged if "loss" in one} == of_steps
    assert {step: one["loss"] for step, one in mlflow.logged.items() if step} == of_steps
    assert mlflow.logged[0]["held_out/ce"] == records[0]["held_out"]["ce"]
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"]
    assert wandb.begun[0]["config"]["train"]["steps"] == 2
    assert wandb.step_metrics[0] == ("*", "step")
    assert mlflow.begun == [(None, "run"), ("abc", "run")]
    assert [params["train.lr"] for params in mlflow.params] == ["0.01"], "told once"
    assert wandb.finished == mlflow.ended == 2


def test_a_server_that_does_not_answer_costs_its_numbers_only(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = FakeMlflow(down_at=1)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    assert train(config_of(root, tmp_path / "run", train={"trackers": ["mlflow"], "steps": 2})).finished
    assert set(mlflow.logged) == {0, 2}
    assert "MLflow does not take the numbers of step 1: no answer" in caplog.text


def test_a_package_that_is_not_there_is_named_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InvalidInput, match=r"train\.trackers has 'wandb', but the package 'wandb' is not installed"):
        train(config_of(root, tmp_path / "run", train={"trackers": ["wandb"]}))
    assert not (tmp_path / "run" / "config.json").exists()
