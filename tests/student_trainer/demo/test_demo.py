"""The demo's guard and its page; the demo itself is run by `make demo`."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.commands.demo import print_outcome
from potstill.student_trainer.demo.plan import DemoPlan
from potstill.student_trainer.demo.report import report_page
from potstill.student_trainer.demo.run import run_demo
from potstill.student_trainer.evaluate.result import TrainResult


def never(plan: DemoPlan, student: str) -> TrainResult:
    raise AssertionError("nothing is trained")


def test_a_folder_that_is_not_a_demos_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="is not empty and holds no demo; choose another folder"):
        run_demo(DemoPlan(out=tmp_path, models=tmp_path), Console(), never)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["cache", "cache/mine.txt"]


def report(tokens_per_second: float | None) -> dict[str, Any]:
    """Make what the demo reports, with a token that is markup."""
    falling = [{"step": 10 * i, "held_out_loss": 11.02 - 0.45 * i, "kl_to_teacher": 8.0 - 0.5 * i} for i in range(9)]
    students = {
        name: {"held_out_loss": loss, "kl_to_teacher": 4.3, "top1_agreement": 0.1, "curve": falling}
        for name, loss in (("cross-entropy", 6.96), ("distilled", 6.46))
    }
    guesses = [{"text": text, "probability": 0.2} for text in ("<b>", " the", "\n")]
    return {
        "teacher": {"model": "SmolLM2-135M-Instruct", "vocab_size": 49_152},
        "corpus": {"rows": 49, "positions": 10_000, "shards": 5},
        "targets": {
            "k": 64,
            "encoding": {"name": "u8", "max_abs_error": 0.0635},
            "bytes_per_position": 116.3,
            "max_abs_error": 0.05,
            "mean_kl": 6e-5,
        },
        "students": students,
        "plan": {"layers": 2, "steps": 80, "held_out_rows": 10},
        "writings": [{"prompt": "text so ", "goes_on": {"teacher": " far\n<i>", "distilled": " the" + "\n" * 31}}],
        "samples": [
            {"context": "text so ", "next_text": " far", "guesses": {"teacher": guesses, "distilled": guesses}}
        ],
        "saved": {"positions_read": 150_000, "tokens_per_second": tokens_per_second},
        "seconds": {"teacher": 60.0, "prefill": 110.0},
    }


def test_the_outcome_says_where_the_teacher_is_and_what_to_type_next(tmp_path: Path) -> None:
    told = io.StringIO()
    plan = DemoPlan(out=tmp_path / "my demo", models=tmp_path / ("models" * 20))
    print_outcome(Console(file=told, width=80), plan, report(125.0))
    model = plan.models / "smollm2-135m-instruct"
    lines = told.getvalue().splitlines()
    assert f"teacher: {model} (a model folder, for wherever one is asked for)" in lines
    serve = shlex.split(lines[-1])
    assert serve[1:] == ["serve", "--teacher", f"smollm2={model}", "--cache", str(plan.cache)]
    assert shlex.split(lines[-2])[1:] == ["inspect", str(plan.cache)]


def test_the_report_has_legends_round_ticks_and_what_the_cache_saves() -> None:
    page = report_page(report(125.0))
    for chart in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        assert re.findall(r"</i>([\w-]+)</span>", chart) == ["cross-entropy", "distilled"]
        ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", chart)]
        assert all(tick == round(2 * tick) / 2 for tick in ticks), "halves at the most"
    assert "15.0 for each that was scored" in page
    assert "without it 1,200 s for each student" in page
    assert '<td class="number">80 s</td>' in page
    assert "98,304" in page


def test_the_report_of_a_demo_that_went_on_says_nothing_of_the_teachers_speed() -> None:
    page = report_page(report(None))
    assert "tokens/s" not in page
    assert "with the cache" not in page


def test_a_student_that_writes_line_ends_alone_does_not_fill_the_page() -> None:
    assert " the\u23ce \u00d7 31\n</span>" in report_page(report(None))


def test_text_of_tokens_is_text_on_the_report() -> None:
    page = report_page(report(None))
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert not re.findall(r"<(?:script|link|img|iframe)|url\(", page)
