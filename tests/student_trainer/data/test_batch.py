"""Rows and targets as tensors, from the cache's folder and from a running service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.cache.cache import Cache
from potstill.cache.errors import (
    CorruptSegment,
    InvalidInput,
    NotCommitted,
    SpecMismatch,
    StoreSilent,
    TeacherFailed,
    UnknownTeacher,
    UnsupportedField,
)
from potstill.cache.types import Targets, Tokens
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data import Batch, BatchReader
from potstill.student_trainer.data.sources import TargetSource, cache_source, open_sources
from potstill.student_trainer.losses import NO_LABEL
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import K, config_of, fake_teacher, fill, write_cache


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_cache(tmp_path_factory.mktemp("cache"))
    fill(root, "partial", shards=2)
    return root


def with_teacher(root: Path, tmp_path: Path, **teacher: object) -> TrainConfig:
    return config_of(root, tmp_path / "run", teachers=[{"name": "fake", **teacher}])


class ScriptedSource:
    """A source that answers from a function, and counts its calls."""

    def __init__(self, answer: FakeTeacher, *, drop: int = 0, fail_at: int = -1) -> None:
        self.answer = answer
        self.drop = drop
        self.fail_at = fail_at
        self.calls = 0
        self.bad_row = -1

    def read(self, indexes: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        self.calls += 1
        if self.calls == self.fail_at or self.bad_row in indexes:
            raise CorruptSegment("segment 7 is damaged")
        return [self.answer.distribution(row, K)[: len(row) - self.drop] for row in rows]


def scripted_reader(root: Path, *, drop: int = 0, fail_at: int = -1) -> tuple[BatchReader, ScriptedSource]:
    teacher = fake_teacher()
    source = ScriptedSource(teacher, drop=drop, fail_at=fail_at)
    opened = TargetSource("scripted", teacher.identity, "k=8, encoding f32", source.read)
    return BatchReader(Cache.open(root).corpus("docs"), (opened,), (1.0,)), source


def test_a_batch_lines_up_tokens_labels_and_targets(root: Path, tmp_path: Path) -> None:
    cache = Cache.open(root)
    corpus = cache.corpus("docs")
    with open_sources(with_teacher(root, tmp_path).teachers, cache, corpus) as sources:
        batch = BatchReader(corpus, sources, (0.7,)).read([5, 0, 11])
    targets = batch.teachers[0]
    assert targets.weight == 0.7
    for i, row in enumerate(corpus.row(index) for index in (5, 0, 11)):
        length = len(row)
        expected = fake_teacher().distribution(row, K)
        assert batch.tokens[i, :length].tolist() == row.tolist()
        assert batch.mask[i].tolist() == [t < length for t in range(batch.mask.shape[1])]
        assert batch.labels[i, : length - 1].tolist() == row[1:].tolist()
        assert (batch.labels[i, length - 1 :] == NO_LABEL).all()
        np.testing.assert_array_equal(targets.ids[i, :length], expected.ids)
        np.testing.assert_allclose(targets.logprobs[i, :length], expected.logprobs, atol=1e-5)
        np.testing.assert_allclose(targets.log_tail[i, :length], expected.log_tail, rtol=2e-3, atol=1e-4)
        assert (targets.logprobs[i, length:] == -torch.inf).all()
        assert (targets.log_tail[i, length:] == -torch.inf).all()
    assert batch.num_positions == int(batch.mask.sum())
    assert batch.num_labels == batch.num_positions - 3


def test_a_service_gives_the_same_batch_as_the_cache(root: Path, tmp_path: Path) -> None:
    cache = Cache.open(root)
    corpus = cache.corpus("docs")

    def read(config: TrainConfig) -> Batch:
        with open_sources(config.teachers, cache, corpus) as sources:
            return BatchReader(corpus, sources, (1.0,)).read([3, 1, 4])

    with serving_teachers(hosted("fake", fake_teacher())) as url:
        served = read(with_teacher(root, tmp_path, source="service", url=url, k=5))
    cached = read(with_teacher(root, tmp_path, k=5))
    assert torch.equal(served.tokens, cached.tokens)
    ours, theirs = served.teachers[0], cached.teachers[0]
    assert torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.log_tail, theirs.log_tail, atol=1e-4, rtol=2e-3)


def test_a_teacher_of_another_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    cache = Cache.open(root)
    with serving_teachers(hosted("fake", FakeTeacher())) as url:
        config = with_teacher(root, tmp_path, source="service", url=url)
        with (
            pytest.raises(SpecMismatch, match="tokenizer"),
            open_sources(config.teachers, cache, cache.corpus("docs")),
        ):
            pass


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        ({"name": "nobody"}, UnknownTeacher, "nobody"),
        ({"name": "partial"}, NotCommitted, "lacks .* shards, the first is 2"),
        (
            {"k": K + 1},
            UnsupportedField,
            f"k={K}; lower teachers.k, or prefill it under another name with --top-k {K + 1}$",
        ),
        (
            {"source": "service", "url": "http://127.0.0.1:9", "api_key_env": "NOT_SET_HERE"},
            InvalidInput,
            "NOT_SET",
        ),
    ],
)
def test_what_is_not_there_is_said_before_training(
    root: Path, tmp_path: Path, teacher: dict[str, object], error: type[Exception], message: str
) -> None:
    cache = Cache.open(root)
    config = with_teacher(root, tmp_path, **teacher)
    with pytest.raises(error, match=message), open_sources(config.teachers, cache, cache.corpus("docs")):
        pass


def test_fewer_targets_than_tokens_are_refused(root: Path) -> None:
    reader, _ = scripted_reader(root, drop=1)
    with pytest.raises(TeacherFailed, match="targets for a row of"):
        reader.read([0])


def test_the_cache_source_cuts_to_k(root: Path) -> None:
    cache = Cache.open(root)
    source = cache_source("fake", cache.targets("fake", "docs"), 3)
    (targets,) = source.read([2], [cache.corpus("docs").row(2)])
    assert targets.k == 3
    np.testing.assert_allclose(np.exp(targets.logprobs).sum(1) + np.exp(targets.log_tail), 1.0, atol=1e-3)
    assert source.identity.tokenizer_sha256 == cache.corpus("docs").tokenizer_sha256
    assert source.held == "k=3, encoding f32"


def test_batches_that_are_read_together_are_those_that_are_read_alone_up_to_the_one_to_blame(root: Path) -> None:
    reader, source = scripted_reader(root)
    alone = [reader.read_packed([[3, 1], [0]]), reader.read_packed([]), reader.read_packed([[7]])]
    source.calls = 0
    together = list(reader.read_many([[[3, 1], [0]], [], [[7]]]))
    assert source.calls == 1
    for one, other in zip(alone, together, strict=True):
        assert one.num_bytes == other.num_bytes
        for mine, theirs in zip(tensors(one), tensors(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True)
    reader, source = scripted_reader(root)
    source.bad_row = 4
    some = reader.read_many([[[3]], [[4]], [[5]]])
    assert torch.equal(next(some).tokens, reader.read_packed([[3]]).tokens)
    with pytest.raises(CorruptSegment, match="segment 7"):
        next(some)


def test_a_store_that_does_not_answer_is_not_asked_again_for_each_batch(root: Path) -> None:
    asked: list[int] = []

    def read(_: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        asked.append(len(rows))
        raise StoreSilent("the store does not answer")

    source = TargetSource("silent", fake_teacher().identity, "k=3", read)
    reader = BatchReader(Cache.open(root).corpus("docs"), (source,), (1.0,))
    with pytest.raises(StoreSilent):
        next(reader.read_many([[[0]], [[1]], [[2]]]))
    assert asked == [3]


def test_a_teacher_without_a_top_k_is_laid_as_tail_alone(root: Path) -> None:
    teacher = fake_teacher()

    def read(_: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        return [teacher.distribution(row, K).without_top_k() for row in rows]

    source = TargetSource("tail", teacher.identity, "k=0", read)
    batch = BatchReader(Cache.open(root).corpus("docs"), (source,), (1.0,), prefix=(1,)).read([5, 0])
    targets = batch.teachers[0]
    assert targets.ids.shape == targets.logprobs.shape == (*batch.tokens.shape, 0)
    assert torch.equal(targets.log_tail == 0.0, batch.mask)


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def take(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    batch.each(take)
    return found
