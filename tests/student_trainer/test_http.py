"""A trainer whose cache is behind a service trains as one that has the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data import Batch
from potstill.student_trainer.loop import train
from potstill.student_trainer.metrics import read_metrics
from potstill.student_trainer.run import open_run
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import config_of, write_cache

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
    return config_of(Path("unused"), out, data={"cache": str(cache)}, teachers=teachers)


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
    records = [
        [{k: v for k, v in record.items() if "second" not in k} for record in read_metrics(config.run_dir)]
        for config in runs.values()
    ]
    assert records[0] == records[1]
    files, http = (load_file(config.run_dir / "model" / "model.safetensors") for config in runs.values())
    assert files.keys() == http.keys()
    assert all(torch.equal(files[name], http[name]) for name in files)
    tokenizers = [json.loads((config.run_dir / "model" / "tokenizer.json").read_text()) for config in runs.values()]
    assert tokenizers[0] == tokenizers[1]


def test_a_run_goes_on_over_http_where_it_stopped_on_files(root: Path, url: str, tmp_path: Path) -> None:
    config = two_teachers(root, tmp_path / "a")
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 5})}))
    train(two_teachers(url, tmp_path / "a"))
    assert read_metrics(tmp_path / "a")[-1]["step"] == 10


def test_a_key_that_is_not_set_is_named(tmp_path: Path) -> None:
    config = config_of(Path("x"), tmp_path, data={"cache": "http://127.0.0.1:9", "api_key_env": "NOT_SET_HERE"})
    with pytest.raises(InvalidInput, match="NOT_SET_HERE"), open_run(config):
        pass
