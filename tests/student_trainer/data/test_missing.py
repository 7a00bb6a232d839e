"""Shards without targets: refused, their rows left out and counted, or asked of the running teacher."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, NotCommitted, SpecMismatch
from potstill.cache.types import Fields
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.data.held_out import choose_held_out
from potstill.student_trainer.data.missing import lacking_rows
from potstill.student_trainer.data.sources import open_sources
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import K, config_of, fake_teacher, fill, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PARTIAL = [{"name": "fake"}, {"name": "partial"}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_cache(tmp_path)
    fill(root, "partial", shards=3)
    return root


def test_skipped_rows_are_in_no_step_and_counted(root: Path, tmp_path: Path) -> None:
    corpus = Cache.open(root).corpus("docs")
    first = int(corpus.shard_rows[3])
    config = config_of(root, tmp_path / "run", teachers=PARTIAL, data={"missing": "skip"}, train={"steps": 2})
    with open_run(config) as run:
        assert run.skipped_rows == len(corpus) - first
        assert run.order.take(0, 3 * first).max() < first
        assert len(run.held_out)
        assert run.held_out.max() < first
    result = train(config)
    records = read_metrics(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.skipped_rows == summary["skipped_rows"] == records[1]["skipped_rows"] == len(corpus) - first
    assert train(config) == result, "a finished run is found"


def test_a_run_is_refused_that_would_go_on_with_other_rows(root: Path, tmp_path: Path) -> None:
    constant = {"steps": 2, "schedule": "constant"}
    settings = {"teachers": PARTIAL, "data": {"missing": "skip"}}
    train(config_of(root, tmp_path / "run", train=constant, **settings))
    fill(root, "partial", shards=5)
    with pytest.raises(SpecMismatch, match="other shards lack targets than when the run was started"):
        train(config_of(root, tmp_path / "run", train={**constant, "steps": 4}, **settings))


def test_what_is_missing_is_asked_of_the_running_teacher(root: Path, tmp_path: Path) -> None:
    cache = Cache.open(root)
    corpus, teacher = cache.corpus("docs"), fake_teacher("partial")
    rows = [0, len(corpus) - 1, 3, len(corpus) - 2]
    with serving_teachers(hosted("partial", teacher)) as url:
        teachers = [{"name": "partial", "url": url}]
        config = config_of(root, tmp_path / "run", teachers=teachers, data={"missing": "ask"})
        with open_sources(config.teachers, cache, corpus, "ask") as [source]:
            assert len(lacking_rows(corpus, [source])) == 0
            assert source.held == f"k={K}, encoding f32"
            answers = source.read(rows, corpus.take(rows))
        asked = len(teacher.scored)
        assert train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})).finished
    for row, found in zip(rows, answers, strict=True):
        expected = teacher.distribution(corpus.row(row), K)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    assert asked == 2, "the rest is kept"


def test_another_teacher_is_not_asked(root: Path, tmp_path: Path) -> None:
    cache = Cache.open(root)
    with serving_teachers(hosted("partial", fake_teacher("another"))) as url:
        teachers = [{"name": "partial", "url": url}]
        config = config_of(root, tmp_path / "run", teachers=teachers, data={"missing": "ask"})
        with (
            pytest.raises(
                SpecMismatch, match=r"'partial' at teachers\.url is not the one in the cache: weights_sha256"
            ),
            open_sources(config.teachers, cache, cache.corpus("docs"), "ask"),
        ):
            pass


def test_bad_settings_are_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotCommitted, match=r"lacks \d+ of \d+ shards.* or set data\.missing to 'skip' or 'ask'$"):
        train(config_of(root, tmp_path / "run", teachers=PARTIAL))
    with pytest.raises(InvalidInput, match=r"data\.missing is 'ask', but teacher 'fake' has no url; set teachers\.url"):
        config_of(root, tmp_path / "run", teachers=PARTIAL, data={"missing": "ask"})
    with pytest.raises(InvalidInput, match=r"the url of teacher 'fake' is not used: .* data\.missing to \"ask\""):
        config_of(root, tmp_path / "run", teachers=[{"name": "fake", "url": "http://127.0.0.1:9"}])
    served = [{"name": "fake", "source": "service", "url": "http://127.0.0.1:9"}]
    with pytest.raises(InvalidInput, match=r"data\.missing is 'skip', but no teacher is read from a cache"):
        config_of(root, tmp_path / "run", teachers=served, data={"missing": "skip"})


def test_held_out_rows_that_all_lack_targets_are_told(root: Path, tmp_path: Path) -> None:
    """Without a word there would be no evaluation, and `evaluate` would say that `data.held_out` is 0."""
    fill(root, "first", shards=1)
    corpus = Cache.open(root).corpus("docs")
    held_out = (choose_held_out(corpus.document_rows, 4, seed, "docs") for seed in range(99))
    seed = next(seed for seed, rows in enumerate(held_out) if rows.min() >= corpus.shard_rows[1])
    data = {"missing": "skip", "held_out": 4, "held_out_seed": seed}
    with pytest.raises(InvalidInput, match=r"all \d held-out rows lack targets, .*; run `potstill prefill` for them"):
        train(config_of(root, tmp_path / "run", teachers=[{"name": "first"}], data=data))


def test_fields_that_the_loss_does_not_need_may_be_missing(root: Path, tmp_path: Path) -> None:
    """Here and over HTTP: draws of the first shards only, beside entropies of all."""
    fill(root, "fake", fields=Fields(k=0, entropy=True))
    fill(root, "fake", fields=Fields(k=0, draws=4), shards=2)
    corpus = Cache.open(root).corpus("docs")
    needs = {"teachers": [{"name": "fake"}, {"name": "other"}], "train": {"weighting": "entropy"}}
    fill(root, "other", fields=Fields(k=K, entropy=True))
    config = config_of(root, tmp_path / "run", **needs)
    with open_sources(config.teachers, Cache.open(root), corpus, "fail", config.train) as sources:
        assert len(lacking_rows(corpus, sources)) == 0
    drawing = config_of(root, tmp_path / "run", train={"loss": "hybrid"})
    with (
        pytest.raises(NotCommitted, match=r"'fake' lacks \d+ of \d+ shards, the first is 2"),
        open_sources(drawing.teachers, Cache.open(root), corpus, "fail", drawing.train),
    ):
        pass
    with serving_teachers(hosted("fake", fake_teacher()), cache=Cache.open(root)) as url, HttpCache(url) as served:
        targets = served.targets("fake", "docs")
        assert not targets.committed.all()
        assert targets.only(Fields(k=K, entropy=True)).committed.all()
        assert targets.only(Fields(k=0, draws=4)).committed.sum() == 2


def test_draws_of_missing_shards_are_asked_of_the_running_teacher(root: Path, tmp_path: Path) -> None:
    """They are those that a prefill would keep: as many, under the same seed."""
    fill(root, "partial", fields=Fields(k=0, draws=4, seed=7), shards=2)
    cache = Cache.open(root)
    corpus, teacher = cache.corpus("docs"), fake_teacher("partial")
    rows = [0, len(corpus) - 1]
    with serving_teachers(hosted("partial", teacher)) as url:
        changes = {"teachers": [{"name": "partial", "url": url}], "data": {"missing": "ask"}}
        config = config_of(root, tmp_path / "run", train={"loss": "draws", "steps": 2}, **changes)
        with open_sources(config.teachers, cache, corpus, "ask", config.train) as [source]:
            answers = source.read(rows, corpus.take(rows))
        assert train(config).finished
    for row, found in zip(rows, answers, strict=True):
        [expected] = asyncio.run(teacher.score([corpus.row(row)], Fields(k=K, draws=4, seed=7)))
        assert found.draws is not None
        assert expected.draws is not None
        np.testing.assert_array_equal(found.draws.ids, expected.draws.ids)
        np.testing.assert_array_equal(found.draws.counts, expected.draws.counts)


@pytest.mark.parametrize(("draws", "found"), [({}, 50), ({"draws": 9}, 9)])
def test_draws_come_from_a_service(root: Path, tmp_path: Path, draws: dict[str, int], found: int) -> None:
    with serving_teachers(hosted("fake", fake_teacher())) as url:
        teachers = [{"name": "fake", "source": "service", "url": url, "k": K, **draws}]
        config = config_of(root, tmp_path / "run", teachers=teachers, train={"loss": "hybrid", "steps": 1})
        with open_run(config) as run:
            assert run.held == {"fake": f"k={K}, {found} draws of seed 0, from a service"}
            counts = run.reader.read([0]).teachers[0].drawn_counts
            assert counts is not None
            assert (counts[0].sum(dim=-1) == found).all()
        assert train(config).finished
