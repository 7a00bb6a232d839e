"""Teachers that see tokens in front of each row: the student sees them, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.edges.e01_prefix_kl import measure
from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, LimitExceeded, SpecMismatch
from potstill.cache.types import Fields
from potstill.student_trainer.checkpoint.folders import newest_checkpoint
from potstill.student_trainer.losses import NO_LABEL
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import evaluate_run, open_run
from tests.support.tiny_runs import STUDENT, K, config_of, fake_teacher, fill, unhashed, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of one teacher without a prefix, and of two with different ones."""
    import asyncio

    from potstill.cache.types import Targets

    root = write_cache(tmp_path_factory.mktemp("cache"), documents=20)
    cache = Cache.open(root, "r+")
    corpus = cache.corpus("docs")
    for name, prefix in (("bos", (1,)), ("two", (1, 2))):
        teacher = fake_teacher(name)
        identity = replace(teacher.identity, prefix_ids=prefix)
        targets = cache.plan_targets(name, "docs", identity, fields=Fields(k=K), encoding="f32")
        for shard in range(corpus.num_shards):
            rows = corpus.rows(*(int(r) for r in corpus.shard_rows[shard : shard + 2]))
            scored = asyncio.run(teacher.score(rows, Fields(k=K)))
            assert targets.write_shard(shard, Targets.concat(scored), teacher.provenance) is not None
    return root


@pytest.mark.parametrize(
    "cases", [("f32", "prefix u8"), pytest.param(("u8", "prefix f32"), marks=pytest.mark.slow)], ids=" and ".join
)
def test_a_student_that_is_its_teacher_has_no_distance_from_it(tmp_path: Path, cases: tuple[str, ...]) -> None:
    found = measure(tmp_path, cases)
    assert len(found) == 4
    for case, kl in found.items():
        assert abs(kl) <= (1e-4 if "f32" in case else 1e-3), found


def test_rows_have_the_prefix_in_front_and_no_target_there(root: Path, tmp_path: Path) -> None:
    plain, with_prefix = (config_of(root, tmp_path, teachers=[{"name": name}]) for name in ("fake", "two"))
    with open_run(plain) as one, open_run(with_prefix) as other:
        assert other.reader.prefix == (1, 2)
        assert other.row_tokens == one.row_tokens + 2
        there, here = one.reader.read([3, 0]), other.reader.read([3, 0])
        ours, theirs = (each.reader.measure(torch.tensor([3, 0]).numpy()) for each in (other, one))
        assert (ours.num_labels, ours.num_positions) == (theirs.num_labels, theirs.num_positions)
        assert (ours.lengths == theirs.lengths + 2).all()
    assert here.tokens[:, :2].tolist() == [[1, 2]] * 2
    assert torch.equal(here.tokens[:, 2:], there.tokens)
    assert not here.mask[:, :2].any()
    assert (here.labels[:, :2] == NO_LABEL).all()
    assert (here.num_labels, here.num_positions) == (there.num_labels, there.num_positions)
    assert (here.teachers[0].logprobs[:, :2] == -torch.inf).all()
    assert (here.teachers[0].log_tail[:, :2] == -torch.inf).all()
    assert torch.equal(here.mask[:, 2:], there.mask)
    assert torch.equal(here.labels[:, 2:], there.labels)


def test_different_prefixes_need_a_choice(root: Path, tmp_path: Path) -> None:
    teachers = [{"name": "fake"}, {"name": "bos"}]
    told = r"'fake' has \[\], 'bos' has \[1\]; choose what the student sees by data\.prefix_ids"
    with pytest.raises(SpecMismatch, match=told):
        train(config_of(root, tmp_path / "run", teachers=teachers))
    for chosen in ([], [7, 8]):
        with open_run(config_of(root, tmp_path, teachers=teachers, data={"prefix_ids": chosen})) as run:
            assert run.reader.prefix == tuple(chosen)


def test_the_prefix_counts_in_what_a_student_can_hold(root: Path, tmp_path: Path) -> None:
    student = {"config": {**STUDENT, "max_position_embeddings": 12}}
    config = config_of(root, tmp_path / "run", data={"prefix_ids": [1]}, student=student, train={"steps": 1})
    with pytest.raises(LimitExceeded, match="row of 13 tokens"):
        train(config)


def test_a_prefix_of_an_id_that_the_corpus_has_not_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^data\.prefix_ids has id 900, but the corpus's tokenizer has \d+ ids"):
        train(config_of(root, tmp_path / "run", data={"prefix_ids": [1, 900]}))


def test_a_run_without_the_prefix_does_not_go_on_with_it(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run", teachers=[{"name": "bos"}], train={"steps": 1})
    train(config)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    unhashed(checkpoint, prefix_ids=[])  # as a version wrote it whose students never saw a prefix
    longer = config_of(root, tmp_path / "run", teachers=[{"name": "bos"}], train={"steps": 2})
    with pytest.raises(SpecMismatch, match=r"sees the prefix \[1\], but the run was started with \[\]"):
        train(longer)
    with pytest.raises(SpecMismatch, match="sees the prefix"):
        evaluate_run(tmp_path / "run")


def test_without_teachers_there_is_no_prefix(root: Path, tmp_path: Path) -> None:
    fill(root, "third")
    with open_run(config_of(root, tmp_path, teachers=[], train={"alpha": 0})) as run:
        assert run.reader.prefix == ()
