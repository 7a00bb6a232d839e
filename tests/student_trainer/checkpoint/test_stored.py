"""Runs in object stores, on a real S3 server: put as they go on, brought back elsewhere, never half of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from potstill.cache.errors import CorruptSegment, StoreError
from potstill.cache.store.root import Root
from potstill.clients.cli import main
from potstill.student_trainer.checkpoint.marker import mark
from potstill.student_trainer.checkpoint.stored import StoredRun
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.train_config import local_copy
from potstill.student_trainer.launch.ending import tell_end
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import evaluate_run
from tests.support.processes.faulty_proxy import Fault, faulty_proxy
from tests.support.processes.s3 import S3Server, s3_server
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a new run; copies of it are in the test's folder."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    return f"{server.new_bucket()}/run"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Goes to another machine: one that has no copy."""
    return lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))


def config(root: Path, out: str, steps: int) -> TrainConfig:
    loop = {"steps": steps, "schedule_steps": 12, "checkpoint_every": 3, "eval_every": 12}
    return config_of(root, Path("unused"), train={**loop, "out": out})


def groups(url: str) -> list[str]:
    store = Root.open(url)
    found = [f"{kind}/{name}" for kind in ("checkpoints", "results") for name in store.folders(kind)]
    return [name for name in found if store.get(f"{name}/stored.json") is not None]


def test_a_run_is_finished_on_another_machine_and_evaluated_from_the_store(
    root: Path, tmp_path: Path, url: str, elsewhere: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(root, str(tmp_path / "straight"), 12))
    train(config(root, url, 6))
    assert groups(url) == ["checkpoints/step-00000003", "checkpoints/step-00000006", "results/step-00000006"]
    assert train(config(root, url, 6)).seconds == train(config(root, url, 6)).seconds, "finished before"
    elsewhere()
    begun: list[int] = []
    result = train(config(root, url, 12), on_begin=begun.append)
    assert begun == [6]
    assert groups(url) == ["checkpoints/step-00000009", "checkpoints/step-00000012", "results/step-00000012"]
    ours, theirs = (
        load_file(folder / "model" / "model.safetensors") for folder in (result.run_dir, tmp_path / "straight")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [record["step"] for record in read_metrics(result.run_dir) if "loss" in record] == list(range(1, 13))
    shutil.rmtree(local_copy(url))
    assert evaluate_run(url) == evaluate_run(tmp_path / "straight")
    assert main(["evaluate", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out"]["loss"]["value"] > 0
    again = train(config(root, url, 12))
    assert again.held_out == result.held_out, "brought, not trained again"
    tell_end(again, config(root, url, 12))
    assert capsys.readouterr().out.endswith(f"\nrun: {url}, of which the folder here is a copy\n")


def test_a_url_without_a_run_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", url]) == 1
    assert capsys.readouterr().err == f"not_found: no run at {url}: nothing that a run puts in a store is there\n"


def test_a_damaged_checkpoint_is_passed_over_and_half_of_one_never_read(
    root: Path, url: str, elsewhere: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    train(config(root, url, 9))
    store, newest = Root.open(url), "checkpoints/step-00000009"
    store.delete("results")
    store.remove(f"{newest}/checkpoint/optimizer.pt")
    store.create(f"{newest}/checkpoint/optimizer.pt", b"another one")
    store.create("checkpoints/step-00000010/checkpoint/state.json", b"half of it")
    elsewhere()
    begun: list[int] = []
    with caplog.at_level(logging.WARNING, "potstill.student_trainer"):
        train(config(root, url, 9), on_begin=begun.append)
    assert begun == [6]
    (told,) = (message for message in caplog.messages if "damaged" in message)
    assert f"{newest} is damaged: checkpoint/optimizer.pt" in told
    assert "the newest good one is step-00000006" in told
    assert groups(url) == ["checkpoints/step-00000006", newest, "results/step-00000009"]
    for name in ("checkpoints/step-00000006", newest):
        store.remove(f"{name}/checkpoint/state.json")
    elsewhere()
    shutil.rmtree(local_copy(url))
    with pytest.raises(CorruptSegment, match="none is left to go on from"):
        train(config(root, url, 12))


def test_a_store_that_goes_away_is_one_line_and_the_run_goes_on_later(
    root: Path, url: str, server: S3Server, elsewhere: Callable[[], None]
) -> None:
    def leave(record: object) -> None:
        if isinstance(record, dict) and record["step"] == 5:
            server.require_credentials(required=True)

    try:
        with pytest.raises(StoreError, match="access is denied") as caught:
            train(config(root, url, 12), on_record=leave)
        assert "\n" not in caught.value.detail
    finally:
        server.require_credentials(required=False)
    assert groups(url) == ["checkpoints/step-00000003"]
    elsewhere()
    begun: list[int] = []
    assert train(config(root, url, 12), on_begin=begun.append).finished
    assert begun == [3]


def test_a_store_that_does_not_answer_is_not_said_to_have_the_checkpoint(
    root: Path, server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(_: str, target: str) -> Fault | None:
        return "drop before" if "checkpoints/step-00000006" in target else None

    monkeypatch.setattr("potstill.cache.store.object_stores._RETRIED", timedelta(milliseconds=200))
    with faulty_proxy(server.endpoint, choose) as proxy:
        for name, value in server.environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreError, match="step-00000006.*: the store does not answer") as caught:
            train(config(root, url, 12))
    assert caught.value.kind == "store", "as it may be waited for, the run would end as one that has a checkpoint there"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    assert groups(url) == ["checkpoints/step-00000003"]


def test_a_copy_that_is_damaged_here_is_brought_again(root: Path, url: str) -> None:
    result = train(config(root, url, 6))
    for copy in ("checkpoints/step-00000006/optimizer.pt", "checkpoints/step-00000003/optimizer.pt"):
        (result.run_dir / copy).write_bytes(b"x")
    begun: list[int] = []
    train(config(root, url, 9), on_begin=begun.append)
    assert begun == [6]
    shutil.rmtree(result.run_dir / "model")
    assert train(config(root, url, 9), on_begin=begun.append).finished
    assert (result.run_dir / "model").exists()
    assert begun == [6], "brought, not trained again"


def test_a_machine_that_was_thought_to_be_gone_removes_no_later_checkpoint(tmp_path: Path) -> None:
    for machine, step in (("in its place", 6), ("gone", 4), ("gone", 5)):
        checkpoint = tmp_path / machine / f"checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        for name in ("config.json", "metrics.jsonl"):
            (tmp_path / machine / name).write_text("")
        StoredRun.open(f"file://{tmp_path}/store", tmp_path / machine, write=True).put_checkpoint(checkpoint)
        shutil.rmtree(checkpoint)
    assert groups(f"file://{tmp_path}/store") == ["checkpoints/step-00000005", "checkpoints/step-00000006"]


def test_hashes_that_were_compared_while_bringing_are_not_compared_again(tmp_path: Path) -> None:
    """But where a checkpoint was damaged before it was put, which its own mark tells."""
    url = f"file://{tmp_path}/store"
    for step, damaged in ((1, False), (2, True)):
        checkpoint = tmp_path / f"here/checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        mark(checkpoint)
        if damaged:
            (checkpoint / "state.json").write_text("[]")
        for name in ("config.json", "metrics.jsonl"):
            (tmp_path / "here" / name).write_text("")
        StoredRun.open(url, tmp_path / "here", write=True).put_checkpoint(checkpoint)
        for folder in ("here", "there"):
            assert StoredRun.open(url, tmp_path / folder, write=False).bring() == (-1 if damaged else step)
