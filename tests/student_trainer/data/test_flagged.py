"""Rows that annotations keep out of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potstill.cache.cache import Cache
from potstill.cache.corpus import annotate
from potstill.cache.errors import InvalidInput, NotFound, SpecMismatch
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.data.flagged import flagged_rows
from potstill.student_trainer.train.judged import run_to_judge
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run
from tests.support.processes.servers import serving_teachers
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cache(tmp_path)


def flag(root: Path, name: str, rows: list[int], dtype: type = bool) -> None:
    cache = Cache.open(root, mode="r+")
    corpus = cache.corpus("docs")
    annotate(cache.root, corpus.annotated, name, np.isin(np.arange(len(corpus)), rows).astype(dtype), {})


def drawn(root: Path, out: Path, **data: object) -> set[int]:
    """Rows of an epoch."""
    with open_run(config_of(root, out, data=data)) as run:
        return set(run.order.take(0, run.order.orders[0].rows_per_epoch).tolist())


def test_contaminated_rows_are_left_out_unless_other_annotations_are_named(root: Path, tmp_path: Path) -> None:
    every = drawn(root, tmp_path / "run")
    rows = sorted(every)
    flag(root, "contaminated", rows[:3])
    flag(root, "contaminated-mmlu", rows[2:5])
    flag(root, "contaminatedly", rows[5:6])
    flag(root, "own", rows[6:9])
    flag(root, "score", rows[9:], dtype=float)
    assert drawn(root, tmp_path / "run") == every - set(rows[:5])
    assert drawn(root, tmp_path / "run", leave_out=["own", "contaminated"]) == every - set(rows[:3]) - set(rows[6:9])
    assert drawn(root, tmp_path / "run", leave_out=[]) == every
    with pytest.raises(
        NotFound, match=r"data.leave_out has 'owns', and no corpus has such .* there are: contaminated,"
    ):
        drawn(root, tmp_path / "run", leave_out=["owns"])
    with pytest.raises(InvalidInput, match=r"annotation 'score' of corpus 'docs' is float64, and rows are left out by"):
        drawn(root, tmp_path / "run", leave_out=["score"])
    flag(root, "contaminated-all", rows)
    with pytest.raises(InvalidInput, match=r"no row of corpus 'docs' is left .* are flagged by annotations"):
        drawn(root, tmp_path / "run")


def test_a_corpus_of_a_mixture_needs_not_have_the_annotation(root: Path, tmp_path: Path) -> None:
    write_cache(tmp_path, documents=20, corpus="more", seed=1)
    flag(root, "own", [1, 2])
    cache = Cache.open(root)
    corpora = [cache.corpus("docs"), cache.corpus("more")]
    assert [rows.tolist() for rows in flagged_rows(corpora, ["own"])] == [[1, 2], []]
    assert [rows.tolist() for rows in flagged_rows(corpora, None)] == [[], []]


def test_a_corpus_behind_a_service_has_its_annotations(root: Path) -> None:
    flag(root, "contaminated", [0, 3])
    with serving_teachers(cache=Cache.open(root)) as url, HttpCache(url) as served:
        assert [rows.tolist() for rows in flagged_rows([served.corpus("docs")], None)] == [[0, 3]]


def test_a_run_goes_on_only_with_the_same_rows(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run", train={"steps": 2})
    train(config)
    with open_run(config) as run:
        rows = run.order.take(0, 4).tolist()
    flag(root, "contaminated", rows)
    more = config_of(root, tmp_path / "run", train={"steps": 4})
    with pytest.raises(SpecMismatch, match=r"annotations keep other rows out .* when it was none: set data.leave_out"):
        train(more)
    as_before = config_of(root, tmp_path / "run", train={"steps": 4}, data={"leave_out": []})
    assert train(as_before).finished
    with open_run(more) as run:
        assert run.flagged_rows == 4


def test_held_out_rows_that_are_flagged_are_not_evaluated_on_and_counted(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(root, tmp_path / "run", train={"steps": 1})
    with open_run(config) as run:
        held_out = run.held_out.tolist()
    flag(root, "contaminated", held_out[:2])
    result = train(config)
    assert result.held_out is not None
    assert result.held_out.rows == len(held_out) - 2
    assert "2 rows left out, 2 held-out ones among them, as annotations flag them" in caplog.messages
    with run_to_judge(tmp_path / "run") as subject:
        (judged,) = subject.judged
        assert judged.rows.tolist() == held_out[2:]
        assert judged.notes == ("2 held-out rows left out, as annotations flag them",)
    flag(root, "contaminated-all", held_out)
    with pytest.raises(InvalidInput, match=f"all {len(held_out)} held-out rows lack targets, or annotations flag them"):
        train(config_of(root, tmp_path / "other"))
