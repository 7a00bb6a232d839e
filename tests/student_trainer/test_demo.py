"""The demo's guard; the demo itself is run by `make demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.demo.plan import DemoPlan
from potstill.student_trainer.demo.run import run_demo
from potstill.student_trainer.result import TrainResult


def never(plan: DemoPlan, student: str) -> TrainResult:
    raise AssertionError("nothing is trained")


def test_a_folder_that_is_not_a_demos_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="is not empty and holds no demo; choose another folder"):
        run_demo(DemoPlan(out=tmp_path, models=tmp_path), Console(), never)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["cache", "cache/mine.txt"]
