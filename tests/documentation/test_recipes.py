"""The recipes: their configs are read as the commands read them, and pages say what `potstill estimate` says."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from potstill.cache.entry_points import command_entry_points
from potstill.cache.text.rules import FilterPlan
from potstill.clients.cli import main
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.tasks.questions import write_tasks
from tests.documentation.blocks import blocks_of
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
LARGE, TINY = RECIPES / "lokilm-1.4b", RECIPES / "lokilm-tiny"
RUNS = sorted(set(RECIPES.rglob("*.toml")) - {TINY / "grid.toml", TINY / "filter.toml"})


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.relative_to(RECIPES)))
def test_each_config_is_one(file: Path) -> None:
    config = TrainConfig.from_toml(file)
    assert config.data.corpus or config.data.corpora


def test_the_cells_of_the_tiny_recipe_are_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(TINY)
    grid = GridConfig.from_toml("grid.toml")
    base = tomllib.loads(Path(grid.config).read_text(encoding="utf-8"))
    teachers = {cell.name: len(cell.config(base, 0, "out").teachers) for cell in grid.all_cells}
    assert teachers == {"cross-entropy": 2, "loki": 1, "smollm2-projected": 1, "two-teachers": 2}
    assert len(grid.seeds) == 3
    write_tasks(Path(grid.tasks), tmp_path, Path("/harness"))
    asked = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({each["question"] for each in asked}) == len(asked) == 36
    for each in asked:
        best, some = each["mc1_targets"], each["mc2_targets"]
        labelled = dict(zip(some["choices"], some["labels"], strict=True))
        assert all(labelled[text] == label for text, label in zip(best["choices"], best["labels"], strict=True))
        assert len(labelled) == len(some["choices"]), "two answers are one"
    assert FilterPlan.read("filter.toml").bounds["words"].least == 30


def test_the_tiny_recipe_says_what_its_commands_take(tmp_path: Path) -> None:
    """The script runs with a `potstill` that only notes how it was called, which the real parsers then read."""
    noting = tmp_path / "potstill"
    noting.write_text('#!/usr/bin/env bash\necho "${@@Q}" >> "$NOTES"\n', encoding="utf-8")
    noting.chmod(0o755)
    programs = {"POTSTILL": str(noting), "PYTHON": "true", "NOTES": str(tmp_path / "notes")}
    subprocess.run([TINY / "run.sh", tmp_path / "work"], env={**os.environ, **programs}, check=True, timeout=60)
    commands = command_entry_points()
    called = [shlex.split(line) for line in (tmp_path / "notes").read_text(encoding="utf-8").splitlines()]
    for name, *arguments in called:
        command, parser = commands[name].load(), argparse.ArgumentParser(allow_abbrev=False)
        command.add_arguments(parser)
        parser.parse_args(arguments)
        for argument in arguments:
            assert not argument.endswith((".toml", ".jsonl")) or (tmp_path / "work" / argument).is_file()
    steps = "filter filter ingest ingest ingest contamination contamination card train prefill prefill project"
    assert [name for name, *_ in called] == [*steps.split(), "ablate", "evaluate"]


def test_the_large_run_reads_500_billion_tokens() -> None:
    loop = TrainConfig.from_toml(LARGE / "student.toml").train
    assert loop.steps * loop.batch_rows * 2048 == pytest.approx(500e9, rel=1e-4)


def test_costs_are_what_estimate_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (LARGE / "README.md").read_text(encoding="utf-8")
    [block] = [block for block in blocks_of(LARGE / "README.md") if "potstill estimate" in block.text]
    calls = block.text.replace("\\\n", " ").strip().splitlines()
    assert len(calls) == 2
    for call in calls:
        assert main([*shlex.split(call)[1:], "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        for model in told["compute"]["models"]:
            assert f"| {model['device_hours']:,.0f} | {model['days']:,.1f} | {model['cost']:,.0f} |" in page
        kept = told["encodings"]["u8"]
        assert f"{kept['num_bytes'] / 1e12:.1f} TB, {kept['month']:,.2f} a month" in page
