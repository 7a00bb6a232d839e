"""A trainer whose cache is behind a service trains as one that has the files."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from starlette.responses import JSONResponse

from benchmarks.edges.e16_mask_in_training import masked_corpus
from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, Unavailable
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data import Batch
from potstill.student_trainer.evaluate.result import TrainResult
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.loop import run_session, train
from potstill.student_trainer.train.run import open_run
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving, serving_teachers
from tests.support.tiny_runs import config_of, fill, without_times, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), teachers=("fake", "second"))


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with serving_teachers(hosted("other", FakeTeacher()), cache=Cache.open(root)) as address:
        yield address


def two_teachers(cache: Path | str, out: Path) -> TrainConfig:
    teachers = [{"name": "fake"}, {"name": "second", "k": 3, "weight": 2.0}]
    loop = {"steps": 6, "eval_every": 3, "checkpoint_every": 3}
    return config_of(Path("unused"), out, data={"cache": str(cache)}, teachers=teachers, train=loop)


def batches(config: TrainConfig) -> list[Batch]:
    with open_run(config) as run:
        pieces = [run.order.take(8 * step, 8) for step in range(6)]
        return [run.reader.read(piece) for piece in [*pieces, run.held_out]]


def test_batches_are_the_same_bit_by_bit(root: Path, url: str, tmp_path: Path) -> None:
    config = two_teachers(root, tmp_path / "a")
    for one, other in zip(batches(config), batches(two_teachers(url, tmp_path / "b")), strict=True):
        for name in ("tokens", "mask", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for mine, theirs in zip(one.teachers, other.teachers, strict=True):
            assert mine.weight == theirs.weight
            for name in ("ids", "logprobs", "log_tail"):
                ours, there = getattr(mine, name).numpy(), getattr(theirs, name).numpy()
                assert ours.dtype == there.dtype
                np.testing.assert_array_equal(ours.view(np.uint8), there.view(np.uint8))


def test_a_run_over_http_has_the_same_losses_and_weights(root: Path, url: str, tmp_path: Path) -> None:
    runs = {name: two_teachers(cache, tmp_path / name) for name, cache in (("files", root), ("http", url))}
    for config in runs.values():
        train(config)
    records = [without_times(read_metrics(config.run_dir)) for config in runs.values()]
    assert records[0] == records[1]
    files, http = (load_file(config.run_dir / "model" / "model.safetensors") for config in runs.values())
    assert files.keys() == http.keys()
    assert all(torch.equal(files[name], http[name]) for name in files)
    tokenizers = [json.loads((config.run_dir / "model" / "tokenizer.json").read_text()) for config in runs.values()]
    assert tokenizers[0] == tokenizers[1]


def test_a_run_goes_on_over_http_where_it_stopped_on_files(root: Path, url: str, tmp_path: Path) -> None:
    config = two_teachers(root, tmp_path / "a")
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})}))
    train(two_teachers(url, tmp_path / "a"))
    assert read_metrics(tmp_path / "a")[-1]["step"] == 6


def without_answers(root: Path, first: int, last: float, of: str = "/targets/fake/rows") -> Any:
    """A service of the cache that answers neither the `first` to the `last` request to paths that end with `of`."""
    service = create_app(Service([hosted("other", FakeTeacher())], cache=Cache.open(root)))
    asked = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        if scope["type"] == "http" and scope["path"].endswith(of):
            asked += 1
            if first <= asked <= last:
                refusal = {"kind": "deadline_exceeded", "detail": "scripted"}
                await JSONResponse(refusal, status_code=504)(scope, receive, send)
                return
        await service(scope, receive, send)

    return app


def test_a_run_outlasts_a_service_that_is_away(root: Path, tmp_path: Path) -> None:
    def config(cache: str, out: str, patience: float) -> TrainConfig:
        return config_of(Path("unused"), tmp_path / out, data={"cache": cache, "patience": patience})

    train(config_of(root, tmp_path / "straight"))
    with serving(without_answers(root, 8, 9)) as url:
        assert train(config(url, "waited", 60.0)).finished
    with serving(without_answers(root, 8, math.inf)) as url:
        stopped = config(url, "stopped", 0.3)
        told = "no answer for 0.3 s .*; a checkpoint of step [1-9] was written, and the same command goes on"
        with pytest.raises(Unavailable, match=told):
            train(stopped)
        assert not train(stopped, should_stop=lambda: True).finished
    assert train(config_of(root, tmp_path / "stopped")).finished
    straight, waited, again = (
        load_file(tmp_path / out / "model" / "model.safetensors") for out in ("straight", "waited", "stopped")
    )
    assert all(torch.equal(straight[name], waited[name]) for name in straight)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_run_that_gets_no_answer_at_its_first_evaluation_can_go_on(root: Path, tmp_path: Path) -> None:
    with serving(without_answers(root, 1, math.inf)) as url:
        config = config_of(Path("unused"), tmp_path / "run", data={"cache": url, "patience": 0.3}, train={"steps": 2})
        result = run_session(config, Group(device=torch.device("cpu")), should_stop=lambda: False)
    assert "a checkpoint of step 0 was written" in result.problem
    assert train(config_of(root, tmp_path / "run", train={"steps": 2})).finished


def test_evaluation_on_another_corpus_outlasts_a_service_that_is_away(tmp_path: Path) -> None:
    write_cache(tmp_path)
    root = write_cache(tmp_path, documents=4, corpus="judge", seed=2)
    with serving(without_answers(root, 2, 3, of="/judge/targets/fake/rows")) as url:
        data = {"cache": url, "patience": 60.0, "eval_corpora": ["judge"]}
        result = train(config_of(Path("unused"), tmp_path / "run", data=data, train={"steps": 2}))
    assert set(result.evaluations["judge"].teachers) == {"fake"}


class TwoThreads(Group):
    """A worker of two, each in a thread; their gradients stay apart."""

    meeting = threading.Barrier(2, timeout=30.0)
    given: ClassVar[dict[int, torch.Tensor]] = {}

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.given[self.rank] = tensor.clone()
        self.meeting.wait()
        tensor.copy_(self.given[0] + self.given[1])
        self.meeting.wait()
        return tensor

    def barrier(self) -> None:
        self.meeting.wait()


@pytest.mark.parametrize("first", [8, 9])
def test_a_worker_without_an_answer_stops_the_other_too(tmp_path: Path, first: int) -> None:
    """The 8th question for a loss mask is of a batch that is read ahead, the 9th of the counts of a step."""
    root = masked_corpus(tmp_path)
    fill(root, "fake")

    def stopped(rank: int, cache: str) -> TrainResult:
        data = {"cache": cache, "patience": 0.3, "held_out": 0, "prefetch": 4}
        steps = {"steps": 30, "batch_rows": 4, "micro_batch_rows": 2, "eval_every": 99, "checkpoint_every": 99}
        config = config_of(Path("unused"), tmp_path / "run", data=data, train=steps)
        return run_session(config, TwoThreads(rank=rank, world_size=2), should_stop=lambda: False)

    with serving(without_answers(root, first, math.inf, of="/loss_mask")) as url, ThreadPoolExecutor(2) as threads:
        one, other = threads.map(stopped, (0, 1), (str(root), url))
    assert one.step == other.step > 0
    assert "another worker got no answer" in one.problem
    assert "no answer for 0.3 s" in other.problem


def test_a_key_that_is_not_set_is_named(tmp_path: Path) -> None:
    config = config_of(Path("x"), tmp_path, data={"cache": "http://127.0.0.1:9", "api_key_env": "NOT_SET_HERE"})
    with pytest.raises(InvalidInput, match="NOT_SET_HERE"), open_run(config):
        pass
