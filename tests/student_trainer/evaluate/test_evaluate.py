"""Evaluations of rows that leave something out."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.cache.cache import Cache
from potstill.cache.errors import Unavailable
from potstill.cache.types import Targets, Tokens
from potstill.clients.cli import main
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.sources import TargetSource
from potstill.student_trainer.evaluate.student import evaluate_student
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, VOCAB, K, config_of, fake_teacher, fill, write_cache, write_texts_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_rows_without_a_label_have_no_cross_entropy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_texts_cache(tmp_path, [f"w{i}" for i in range(1, 20)])
    fill(root, "fake")
    result = train(config_of(root, tmp_path / "run", train={"steps": 1}))
    assert result.held_out is not None
    assert result.held_out.ce is None
    assert result.held_out.teachers["fake"].kl > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]["ce"] is None
    assert [record["held_out"]["ce"] for record in read_metrics(tmp_path / "run") if "held_out" in record] == [None] * 2
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["held_out"]["loss"], found["ece"], found["by_category"]) == (None, None, {})
    assert found["teachers"]["fake"]["kl"]["value"] == pytest.approx(result.held_out.teachers["fake"].kl, rel=1e-5)
    assert "no position has a label, so there is no loss; ingest rows of at least two tokens" in found["notes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadGroup(Group):
    """A worker that is a thread."""

    met: threading.Barrier
    given: list[Tensor]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        self.met.wait(60)
        self.given[self.rank] = tensor.clone()
        self.met.wait(60)
        return tensor.copy_(torch.stack(self.given).sum(dim=0))


def test_all_workers_learn_that_one_got_no_answer(tmp_path: Path) -> None:
    """One that did not would wait for the others' sums for ever."""
    corpus = Cache.open(write_cache(tmp_path, documents=10, teachers=())).corpus("docs")
    student = LlamaForCausalLM(LlamaConfig(**STUDENT, vocab_size=VOCAB))
    met, given = threading.Barrier(2), [torch.zeros(())] * 2

    def evaluated(rank: int) -> str:
        def read(_: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
            if rank:
                raise Unavailable("no answer")
            return [fake_teacher().distribution(row, K) for row in rows]

        reader = BatchReader(corpus, (TargetSource("fake", fake_teacher().identity, "", read),), (1.0,))
        group = ThreadGroup(device=torch.device("cpu"), rank=rank, world_size=2, met=met, given=given)
        with pytest.raises(Unavailable) as caught:
            evaluate_student(student, reader, range(8), group=group)
        return caught.value.detail

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(evaluated, range(2))) == ["another worker got no answer", "no answer"]


def test_what_is_not_resolved_of_a_projected_teacher_counts_nothing(tmp_path: Path) -> None:
    """A mean over rows of which nothing is known would tell a distance that is too small."""
    corpus = Cache.open(write_cache(tmp_path, documents=4, teachers=())).corpus("docs")
    student = LlamaForCausalLM(LlamaConfig(**STUDENT, vocab_size=VOCAB))

    def read(indexes: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        answers = [fake_teacher().distribution(row, K) for row in rows]
        unresolved = [
            np.full((len(row), 3), [index > 0, 0, 0], np.float32) for index, row in zip(indexes, rows, strict=True)
        ]
        return [replace(each, alignment=known) for each, known in zip(answers, unresolved, strict=True)]

    reader = BatchReader(corpus, (TargetSource("fake", fake_teacher().identity, "", read),), (1.0,))
    one, both = (evaluate_student(student, reader, rows).teachers["fake"] for rows in ([0], [0, 1]))
    assert asdict(both) == pytest.approx(asdict(one))
    assert not evaluate_student(student, reader, [1]).teachers
