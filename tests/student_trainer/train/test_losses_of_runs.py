"""Runs with each loss, what they read for it, and what they refuse where the cache lacks it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, UnsupportedField
from potstill.cache.types import Fields, Targets, Tokens
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.sources import cache_source
from potstill.student_trainer.evaluate.student import evaluate_student
from potstill.student_trainer.losses.mix import alpha_at
from potstill.student_trainer.losses.settings import LossConfig
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run
from tests.support.fakes import FakeTeacher
from tests.support.tiny_runs import VOCAB, K, config_of, fake_teacher, fill, write_cache

EVERYTHING = Fields(k=K, draws=6, seed=3, entropy=True, temperatures=(0.5, 2.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose teacher `rich` has every field, and `fake` only a top-k."""
    folder = write_cache(tmp_path_factory.mktemp("losses"), documents=20)
    fill(folder, "rich", fields=EVERYTHING)
    return folder


SETTINGS: list[dict[str, Any]] = [
    {"loss": "reverse_kl"},
    {"loss": "jsd", "jsd_beta": 0.3},
    {"loss": "generalised_kl"},
    {"loss": "partial"},
    {"loss": "renormalised"},
    {"loss": "tvd"},
    {"loss": "draws"},
    {"loss": "hybrid"},
    {"temperature": 2.0},
    {"alpha": [[0, 1.0], [2, 0.0]], "distil_every": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_with_each_setting(root: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    short = {"steps": 3, "batch_rows": 4, "micro_batch_rows": 4, "eval_every": 3, "checkpoint_every": 3}
    config = config_of(root, tmp_path / "run", teachers=[{"name": "rich"}], train={**short, **settings})
    assert train(config).finished
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert [bool(record["kl"]) for record in records] == [alpha_at(config.train, step) > 0 for step in range(3)]


@pytest.mark.parametrize("weighting", ["entropy", "label"])
def test_two_teachers_by_token(root: Path, tmp_path: Path, weighting: str) -> None:
    fill(root, f"other-{weighting}", fields=EVERYTHING)
    by_token = {"weighting": weighting, "weighting_beta": 0.5, "alpha": 1.0}
    short = {"steps": 1, "batch_rows": 4, "eval_every": 1, "checkpoint_every": 1, **by_token}
    config = config_of(root, tmp_path / "run", teachers=[{"name": "rich"}, {"name": f"other-{weighting}"}], train=short)
    assert train(config).finished
    record = read_metrics(tmp_path / "run")[1]
    assert min(record["kl"].values()) <= record["loss"] <= max(record["kl"].values())


def test_a_batch_has_what_the_loss_needs(root: Path) -> None:
    cache = Cache.open(root)
    targets = cache.targets("rich", "docs")
    loss = LossConfig(loss="hybrid", weighting="entropy")
    reader = BatchReader(cache.corpus("docs"), (cache_source("rich", targets, 5, loss),), (1.0,))
    batch = reader.read([1, 0])
    (teacher,) = batch.teachers
    assert teacher.drawn_counts is not None
    assert teacher.drawn_ids is not None
    assert teacher.entropy is not None
    assert teacher.log_z is None
    for i, kept in enumerate(targets.read_rows([1, 0])):
        draws, length = kept.draws, kept.num_positions
        assert draws is not None
        assert (teacher.drawn_counts[i, :length].sum(-1) == 6).all()
        found = teacher.drawn_counts[i, :length] > 0
        np.testing.assert_array_equal(teacher.drawn_ids[i, :length][found], draws.ids)
        np.testing.assert_array_equal(teacher.entropy[i, :length], kept.entropy)
        assert teacher.label_logprob is not None
        np.testing.assert_array_equal(teacher.label_logprob[i, :length], kept.label_logprob)
    warm = cache_source("rich", targets, 5, LossConfig(temperature=2.0))
    (teacher,) = BatchReader(cache.corpus("docs"), (warm,), (1.0,)).read([2]).teachers
    (kept,) = targets.read_rows([2])
    assert teacher.log_z is not None
    assert kept.log_z is not None
    np.testing.assert_array_equal(teacher.log_z[0], kept.log_z[:, 1])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss": "draws"}, r"train.loss 'draws' needs draws, which the cache has not of 'fake'; .* --draws 50"),
        ({"temperature": 2.0}, r"train.temperature 2 needs log Z at it, .* 'fake'; .* --temperatures 2"),
        (
            {"weighting": "entropy"},
            r"train.weighting 'entropy' needs entropies, .* 'fake'; .* with --top-k 0 --entropy",
        ),
    ],
)
def test_a_field_that_the_cache_lacks_is_refused_at_the_start(
    root: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UnsupportedField, match=told):
        train(config_of(root, tmp_path / "run", teachers=[{"name": "fake"}, {"name": "rich"}], train=settings))
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_temperature_than_those_kept(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedField, match=r"log Z at it, which the cache has not of 'rich', only at 0\.5, 2"):
        train(config_of(root, tmp_path / "run", teachers=[{"name": "rich"}], train={"temperature": 3.0}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"alpha": [[3, 0.5], [1, 0.5]]}, r"train.alpha is .*: must be \[step, share\] pairs whose steps rise, or"),
        ({"alpha": [[0, 1.5]]}, r"train.alpha is .*less than or equal to 1$"),
        ({"alpha": []}, r"train.alpha is \[\]"),
        ({"loss": "kl"}, r"train.loss is 'kl': "),
        ({"loss": "jsd", "jsd_beta": 1.0}, r"train.jsd_beta is 1.0"),
        ({"loss": "draws", "temperature": 2.0}, r"temperature 2 does not go with loss 'draws'"),
        ({"alpha": 0.0, "distil_every": 4}, r"distil_every is 4, but alpha is 0"),
        ({"alpha": 0.0, "loss": "tvd"}, r"loss is 'tvd', but alpha is 0"),
        ({"jsd_beta": 0.3}, r"jsd_beta is 0.3, but loss is 'forward_kl'"),
        ({"weighting_beta": 2.0}, r"weighting_beta is 2, but weighting is 'fixed'"),
        ({"weighting": "label"}, r"train.weighting is 'label', but there is one teacher"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=told):
        config_of(tmp_path, tmp_path / "run", train=settings)


def test_weights_of_teachers_go_from_point_to_point(root: Path, tmp_path: Path) -> None:
    fill(root, "late", fields=EVERYTHING)
    teachers = [{"name": "rich", "weight": [[0, 1.0], [2, 0.0]]}, {"name": "late", "weight": [[0, 0.0], [2, 3.0]]}]
    short = {"steps": 3, "batch_rows": 4, "eval_every": 3, "checkpoint_every": 3, "alpha": 1.0}
    config = config_of(root, tmp_path / "run", teachers=teachers, train=short)
    assert [config.weights(step) for step in (0, 1, 2, 9)] == [(1.0, 0.0), (0.25, 0.75), (0.0, 1.0), (0.0, 1.0)]
    train(config)
    for record in read_metrics(tmp_path / "run"):
        if "loss" in record:
            first, second = config.weights(record["step"] - 1)
            kl = record["kl"]
            assert record["loss"] == pytest.approx(first * kl["rich"] + second * kl["late"])


SHORT: dict[str, Any] = {"steps": 2, "batch_rows": 4, "eval_every": 2, "checkpoint_every": 2}


def test_draws_alone_teach_and_are_not_measured_by(root: Path, tmp_path: Path) -> None:
    fill(root, "drawn", fields=Fields(k=0, draws=6, seed=3))
    for name in ("drawn", "rich"):
        loop = {**SHORT, "loss": "draws"}
        data = {"held_out": 8}
        assert train(config_of(root, tmp_path / name, data=data, teachers=[{"name": name}], train=loop)).finished
    ours, theirs = (read_metrics(tmp_path / name) for name in ("drawn", "rich"))
    assert [record["loss"] for record in ours if "loss" in record] != []
    assert ours[0]["held_out"]["ce"] == theirs[0]["held_out"]["ce"]
    assert ours[0]["held_out"]["teachers"] == {}
    assert set(theirs[0]["held_out"]["teachers"]) == {"rich"}
    with pytest.raises(UnsupportedField, match="teacher 'drawn' has no top-k"):
        train(config_of(root, tmp_path / "top-k", teachers=[{"name": "drawn"}], train=SHORT))
    with pytest.raises(UnsupportedField, match=r"teachers\.k is 4 for 'drawn', but the cache holds k=0"):
        train(config_of(root, tmp_path / "k", teachers=[{"name": "drawn", "k": 4}], train={**SHORT, "loss": "draws"}))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_targets_are_the_whole_distribution(root: Path, tmp_path: Path, temperature: float) -> None:
    cache = Cache.open(root)
    if temperature == 1.0:
        fill(root, "whole", fields=Fields(k=0, dense=True))
    loss = LossConfig(dense=True, temperature=temperature)
    source = cache_source("whole", cache.targets("whole", "docs"), None, loss)
    corpus = cache.corpus("docs")
    (teacher,) = BatchReader(corpus, (source,), (1.0,)).read([3]).teachers
    exact = fake_teacher("whole").dense_logprobs(corpus.row(3))
    np.testing.assert_allclose(teacher.logprobs[0], exact, atol=1e-5)
    assert teacher.ids[0, 0].tolist() == list(range(VOCAB))
    assert set(teacher.log_tail.flatten().tolist()) == {-math.inf}
    if teacher.log_z is not None:
        np.testing.assert_allclose(teacher.log_z[0], np.log(np.exp(exact / temperature).sum(1)), atol=1e-5)
    config = config_of(
        root,
        tmp_path / "run",
        teachers=[{"name": "whole"}],
        train={**SHORT, "dense": True, "temperature": temperature},
    )
    result = train(config)
    assert result.held_out is not None
    assert result.held_out.teachers["whole"].student_mass_on_top_k == pytest.approx(1.0, abs=1e-5)


def test_dense_targets_that_are_not_kept(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedField, match=r"train\.dense needs the logprobs of all ids, .* --top-k 0 --dense"):
        train(config_of(root, tmp_path / "run", teachers=[{"name": "fake"}], train={"dense": True}))


def test_alpha_goes_from_point_to_point() -> None:
    loss = LossConfig(alpha=((2, 1.0), (6, 0.0)), distil_every=2)
    assert [alpha_at(loss, step) for step in range(8)] == [1.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0]


class _Projected(FakeTeacher):
    """A teacher of which nearly all or little of the tail is not resolved, in turns."""

    def targets(self, row: Tokens, want: Fields) -> Targets:
        found = super().targets(row, replace(want, alignment=False))
        assert found.log_tail is not None
        alignment = np.zeros((len(row), 3), np.float32)
        alignment[:, 0] = np.exp(found.log_tail) * np.where(np.arange(len(row)) % 2 == 0, 0.9, 0.1)
        return replace(found, alignment=alignment)


def test_a_step_tells_the_kl_to_a_projected_teacher_as_evaluation_does(root: Path, tmp_path: Path) -> None:
    """By what is resolved; and nothing of chunks in a step that reads no targets."""
    own = fake_teacher("projected").identity
    identity = own.projected(own.tokenizer_sha256, VOCAB)
    fill(root, "projected", fields=Fields(k=2, alignment=True), teacher=_Projected(identity))
    loop = {**SHORT, "alm": 0.1, "distil_every": 2}
    config = config_of(root, tmp_path / "run", teachers=[{"name": "projected"}], train=loop)
    train(config)
    first, second = (record for record in read_metrics(tmp_path / "run") if "loss" in record)
    with open_run(config) as run:
        student, _ = build_student(config.student, seed=config.train.seed, vocab_size=VOCAB, row_tokens=run.row_tokens)
        found = evaluate_student(student, run.reader, run.order.take(0, 4)).teachers["projected"]
    assert first["kl"]["projected"] == pytest.approx(found.kl, rel=1e-5)
    assert "alm" in first
    assert second["kl"] == {}
    assert "alm" not in second
