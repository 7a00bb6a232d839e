"""The comparison, its tables and its page, of outcomes whose differences are known."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from potstill.cache.errors import FormatError, SpecMismatch
from potstill.student_trainer.ablate.comparison import compare
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.measures import ECE, LOSS, OVERCONFIDENCE, TOP1
from potstill.student_trainer.ablate.outcome import (
    Failure,
    Outcome,
    PerDocument,
    Point,
    load_outcome,
    outcome_file,
)
from potstill.student_trainer.ablate.page import write_page
from potstill.student_trainer.ablate.table import notes, tables

EFFECTS = {"ce": 0.0, "kd": -0.2, "same": 0.001, "lost": 0.0}
DOCUMENTS = 40


def grid_of(folder: Path) -> GridConfig:
    cells = {name: {} if name == "ce" else {"train": {"alpha": 0.5}} for name in EFFECTS}
    return GridConfig(config="student.toml", out=str(folder), baseline="ce", cells=cells, resamples=200)


def outcomes() -> dict[tuple[str, int], Outcome]:
    """Three seeds of each cell but the last, whose runs failed."""
    random = np.random.default_rng(0)
    tokens = random.integers(20, 200, DOCUMENTS) * 1.0
    of_documents = 3.0 + random.normal(0, 0.4, DOCUMENTS)
    found = {}
    for cell, effect in EFFECTS.items():
        for seed in range(3 if cell != "lost" else 0):
            loss = of_documents + effect + random.normal(0, 0.01) + random.normal(0, 0.02, DOCUMENTS)
            curve = [Point(1000 * i, 2.0 * i, 3.0 + effect + 4.0 * 0.5**i) for i in range(6)]
            found[cell, seed] = Outcome(
                cell=cell,
                seed=seed,
                config={},
                base={},
                tokens=5000,
                seconds=10.0,
                asked="a fingerprint",
                notes=["a prompt was cut"],
                measures={
                    LOSS: PerDocument(tokens.tolist(), (loss * tokens).tolist()),
                    "kl big": PerDocument((tokens + 1).tolist(), ((loss - 2) * (tokens + 1)).tolist()),
                    "top1 big": PerDocument((tokens + 1).tolist(), (0.5 * (tokens + 1)).tolist(), True),
                    **calibration(random, tokens, effect),
                    "task truth_mc1 acc": PerDocument([1.0] * 30, truthful(random, cell), True),
                },
                curve=curve,
            )
    return found


def calibration(random: np.random.Generator, tokens: NDArray[Any], effect: float) -> dict[str, PerDocument]:
    """Measures of students that are the surer, the lower their loss is."""
    over = random.normal(0.02 - effect, 0.02, (DOCUMENTS, 3)) * tokens[:, None]
    return {
        TOP1: PerDocument(tokens.tolist(), (0.3 * tokens).tolist(), True),
        ECE: PerDocument(tokens.tolist(), over.tolist()),
        OVERCONFIDENCE: PerDocument(tokens.tolist(), over.sum(axis=1).tolist(), None),
    }


def truthful(random: np.random.Generator, cell: str) -> list[float]:
    """Answers to 30 questions: `kd` is right in nearly all of them, the others in half."""
    return [float(each) for each in random.random(30) < (0.97 if cell == "kd" else 0.5)]


FAILURES = [Failure("lost", 0, "invalid_input: the loss is NaN at step 3")]


def test_means_differences_and_the_way_to_a_loss(tmp_path: Path) -> None:
    found = compare(grid_of(tmp_path), outcomes(), FAILURES)
    rows = {row.cell: row for row in found.rows}
    assert list(rows) == ["ce", "kd", "same", "lost"]
    one = [each for (cell, _), each in outcomes().items() if cell == "kd"]
    losses = [np.sum(each.measures[LOSS].sums) / sum(each.measures[LOSS].counts) for each in one]
    assert rows["kd"].means[LOSS] == pytest.approx(np.mean(losses))
    difference = rows["kd"].differences[LOSS]
    assert difference.value == pytest.approx(rows["kd"].means[LOSS] - rows["ce"].means[LOSS])
    assert difference.value == pytest.approx(-0.2, abs=0.03)
    assert difference.within_noise is False
    assert rows["same"].differences[LOSS].within_noise
    assert rows["ce"].differences == {}
    # Of the curve 3 + effect + 4 / 2^i: the baseline's last loss is met on a line between two looks.
    assert found.target_loss == rows["ce"].means[LOSS]
    reached = rows["kd"].reached
    assert reached is not None
    curve = one[0].curve
    tokens = np.interp(-found.target_loss, [-p.loss for p in curve], [p.tokens for p in curve])
    assert reached.tokens == pytest.approx(tokens, abs=1)
    assert reached.seeds == 3
    assert rows["lost"].failures == ("seed 0: invalid_input: the loss is NaN at step 3",)
    assert rows["lost"].means == {}


def test_seeds_that_only_one_of_two_cells_has_are_left_out(tmp_path: Path) -> None:
    some = outcomes()
    del some["kd", 1]
    whole = compare(grid_of(tmp_path), some, [])
    of_two = {key: each for key, each in some.items() if key[1] != 1}
    assert whole.rows[1].differences == compare(grid_of(tmp_path), of_two, []).rows[1].differences


def test_cells_that_looked_at_other_rows_are_not_compared_by_their_looks(tmp_path: Path) -> None:
    some = {key: replace(each, config={"data": {"leave_out": ["contaminated"]}}) for key, each in outcomes().items()}
    assert compare(grid_of(tmp_path), some, []).rows[1].reached is not None
    some |= {key: replace(each, config={"data": {"leave_out": []}}) for key, each in some.items() if key[0] == "kd"}
    rows = {row.cell: row for row in compare(grid_of(tmp_path), some, []).rows}
    assert rows["kd"].reached is None
    assert rows["kd"].differences


def test_runs_that_were_judged_on_different_documents_are_not_compared(tmp_path: Path) -> None:
    some = outcomes()
    one = some["kd", 0]
    short = {name: replace(each, counts=each.counts[1:], sums=each.sums[1:]) for name, each in one.measures.items()}
    some["kd", 0] = replace(one, measures=short)
    with pytest.raises(SpecMismatch, match="'ce' and 'kd' were judged on different documents"):
        compare(grid_of(tmp_path), some, [])


def test_an_outcome_comes_back_from_its_file(tmp_path: Path) -> None:
    one = outcomes()["kd", 2]
    assert load_outcome(tmp_path, "kd", 2) is None
    one.save(tmp_path)
    assert load_outcome(tmp_path, "kd", 2) == one
    outcome_file(tmp_path, "kd", 2).write_text("{}")
    with pytest.raises(FormatError, match="is no outcome of this version"):
        load_outcome(tmp_path, "kd", 2)


def shown(found: Mapping[tuple[str, int], Outcome], folder: Path) -> str:
    comparison = compare(grid_of(folder), found, FAILURES)
    told = io.StringIO()
    console = Console(file=told, width=80)
    for table in tables(comparison):
        console.print(table)
    console.print("\n".join(notes(comparison)), soft_wrap=True)
    return told.getvalue()


def test_tables_fit_80_columns_and_say_what_is_noise(tmp_path: Path) -> None:
    text = shown(outcomes(), tmp_path)
    tables_only = text[: text.index("held-out documents")]
    assert max(map(len, tables_only.splitlines()[:-1])) <= 80
    lines = [line.strip() for line in tables_only.splitlines()]
    assert any(line.startswith("same ") and line.split()[-2:-1] == ["noise"] for line in lines)
    assert any(line.startswith("kd ") and line.split()[-2:-1] == ["lower"] for line in lines)
    assert any(line.startswith("lost (0 of 3)") for line in lines)
    assert "top1 big" not in text
    titles = ["held-out loss", "KL to big", "next token", "expected calibration", "overconfidence", "truth_mc1 acc"]
    assert sorted(titles, key=text.index) == titles
    of_the_task = text[text.index("truth_mc1 acc \u2191") : text.index("held-out documents")]
    assert "questions" in of_the_task
    assert any(line.split()[0:1] == ["kd"] and line.split()[-1] == "higher" for line in of_the_task.splitlines())
    assert "Tasks: 1 of 2 differences are more than noise: truth_mc1 acc of kd (higher)" in text
    assert "note: a prompt was cut" in text
    assert "lost, seed 0: invalid_input: the loss is NaN at step 3" in text


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    found = outcomes()
    comparison = compare(grid_of(tmp_path), found, [*FAILURES, Failure("lost", 1, "<b>")])
    page = write_page(tmp_path / "report.html", comparison, grid_of(tmp_path), found).read_text()
    assert page.count('<svg class="spans"') == 6
    assert "<h3>truth_mc1 acc \u2191</h3>" in page
    assert "95%, other questions" in page
    assert "Note: a prompt was cut" in page
    assert "&lt;b&gt;" in page
    assert "<b>seed" not in page
    assert "http" not in page
    assert "train.alpha = 0.5" in page
    told = json.loads(json.dumps(comparison.to_json()))
    assert [row["cell"] for row in told["rows"]] == ["ce", "kd", "same", "lost"]
    assert told["rows"][1]["differences"]["loss"]["within_noise"] is False
    assert told["higher_is_better"]["task truth_mc1 acc"] is True
    assert told["higher_is_better"]["overconfidence"] is None
