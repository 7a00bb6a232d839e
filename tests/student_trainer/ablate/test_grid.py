"""The plan of an ablation: cells, their names, and the runs that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.ablate.grid import GridConfig

BASE: dict[str, Any] = {
    "data": {"cache": "c", "corpus": "docs"},
    "teachers": [{"name": "big"}, {"name": "small", "weight": 2.0}],
    "student": {"config": {"model_type": "llama"}},
    "train": {"out": "o", "steps": 3, "seed": 9},
}


def grid(folder: Path, text: str) -> GridConfig:
    file = folder / "grid.toml"
    file.write_text(f'config = "student.toml"\nout = "out"\n{text}')
    return GridConfig.from_toml(file)


def test_cells_are_those_named_and_every_combination(tmp_path: Path) -> None:
    found = grid(
        tmp_path,
        """baseline = "ce"
        [cells]
        ce = { train.alpha = 0 }
        [grid]
        "train.loss" = ["forward_kl", "reverse_kl"]
        "teachers.big.k" = [8, 64]
        """,
    )
    assert found.seeds == (0, 1, 2)
    names = [cell.name for cell in found.all_cells]
    assert names == ["ce", *(f"loss={loss},k={k}" for loss in ("forward_kl", "reverse_kl") for k in (8, 64))]
    last = found.all_cells[-1].config(BASE, 5, "runs/x")
    assert (last.train.loss, last.train.seed, last.train.out) == ("reverse_kl", 5, "runs/x")
    assert [(each.name, each.k, each.weight) for each in last.teachers] == [("big", 64, 1.0), ("small", None, 2.0)]


def test_a_cell_may_have_some_of_the_teachers(tmp_path: Path) -> None:
    text = 'baseline = "none"\n[cells]\nnone = { teachers = [], train.alpha = 0 }\none = { teachers = ["small"] }\n'
    none, one = (cell.config(BASE, 0, "o") for cell in grid(tmp_path, text).all_cells)
    assert none.teachers == ()
    assert [each.name for each in one.teachers] == ["small"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('baseline = "a"\n[cells]\na = {}', "there is nothing to compare"),
        ('baseline = "c"\n[cells]\na = {}\nb = {}', "/grid.toml': baseline 'c' is no cell; there are a, b$"),
        ('baseline = "a"\n[cells]\na = {}\n"../b" = {}', "cell '../b': names are letters, digits"),
        (
            'baseline = "a"\nseeds = [1, 1]\n[cells]\na = {}\nb = {}',
            r"seeds is \[1, 1\]: must be two or more different",
        ),
        ('baseline = "a"\nseed = [1, 2]\n[cells]\na = {}\nb = {}', "seed is unknown; known are config, out, seeds,"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        grid(tmp_path, text)


def test_a_change_that_does_not_fit_the_run_is_refused(tmp_path: Path) -> None:
    text = 'baseline = "a"\n[cells]\na = { teachers.huge.k = 3 }\nb = { train.los = "tvd" }\n'
    a, b = grid(tmp_path, text).all_cells
    with pytest.raises(InvalidInput, match=r"teachers.huge is no teacher of the run; there are big, small"):
        a.config(BASE, 0, "o")
    with pytest.raises(InvalidInput, match=r"train.los is unknown; known are "):
        b.config(BASE, 0, "o")
    assert BASE["teachers"][0] == {"name": "big"}, "the run itself is not changed"
