"""The recipes: their configs are read as the commands read them, and pages say what `potstill estimate` says."""

from __future__ import annotations

import argparse
import json
import os
import runpy
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


def commands_of(script: str, folder: Path, **variables: str) -> list[tuple[str, argparse.Namespace]]:
    """Run a script in a folder with a `potstill` that only notes how it was called, and read that by the real parsers.

    `$POTSTILL` is relative to the folder.
    """
    noting = folder / "bin" / "potstill"
    noting.parent.mkdir()
    noting.write_text(f'#!/usr/bin/env bash\necho "${{@@Q}}" >> {shlex.quote(str(folder))}/notes\n', encoding="utf-8")
    noting.chmod(0o755)
    path = f"{noting.parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "POTSTILL": "bin/potstill", **variables}
    subprocess.run(["bash", "-euc", script], cwd=folder, env=variables, check=True, timeout=60)
    commands = command_entry_points()
    called = []
    for line in (folder / "notes").read_text(encoding="utf-8").splitlines():
        name, *arguments = shlex.split(line)
        parser = argparse.ArgumentParser(allow_abbrev=False)
        commands[name].load().add_arguments(parser)
        called.append((name, parser.parse_args(arguments)))
    return called


def test_the_tiny_recipe_says_what_its_commands_take(tmp_path: Path) -> None:
    called = commands_of(f"{shlex.quote(str(TINY / 'run.sh'))} work", tmp_path, PYTHON="true")
    for _, arguments in called:
        for value in vars(arguments).values():
            for file in value if isinstance(value, list) else [value]:
                assert not str(file).endswith((".toml", ".jsonl")) or (tmp_path / "work" / file).is_file()
    steps = "filter filter ingest ingest ingest contamination contamination card train prefill prefill project"
    assert [name for name, _ in called] == [*steps.split(), "ablate", "evaluate"]


def test_the_tiny_recipe_without_its_programs_begins_nothing(tmp_path: Path) -> None:
    variables = {**os.environ, "POTSTILL": "bin/none", "PYTHON": "true"}
    ran = subprocess.run(
        [TINY / "run.sh", "work"], cwd=tmp_path, env=variables, check=False, timeout=60, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert ran.stderr == "run.sh: there is no program bin/none; name it by POTSTILL or PYTHON\n"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("arguments", [[], ["text"], ["tokenizer", "out"], ["smollm2", "a", "b"]])
def test_preparing_nothing_tells_what_can_be(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"python prepare\.py text FOLDER"):
        runpy.run_path(str(TINY / "prepare.py"))["main"](arguments)


def test_the_large_recipe_makes_what_its_run_reads(tmp_path: Path) -> None:
    data = tomllib.loads((LARGE / "student.toml").read_text(encoding="utf-8"))
    corpora = {*(each["name"] for each in data["data"]["corpora"]), *data["data"]["eval_corpora"]}
    teachers = {each["name"] for each in data["teachers"]}
    parts = [Path(name, f"part-{number:02}") for name in corpora for number in range(1 + (name == "text"))]
    for part in parts:
        (tmp_path / "raw" / part).mkdir(parents=True)
        (tmp_path / "filtered" / part).mkdir(parents=True)
    script = "\n".join(block.text for block in blocks_of(LARGE / "README.md") if block.not_run)
    called = commands_of(script, tmp_path)

    def given(command: str) -> list[argparse.Namespace]:
        return [arguments for name, arguments in called if name == command]

    assert sorted(Path(each.out) for each in given("filter")) == sorted(Path("filtered") / part for part in parts)
    assert {each.corpus for each in given("card")} == {each.corpus for each in given("contamination")} == corpora
    assert sum(len(each.filter) for each in given("card")) == len(parts)
    pairs = {(teacher, corpus) for teacher in teachers for corpus in corpora}
    assert {(each.teacher, each.corpus) for each in given("project")} == pairs
    scored = {(each.corpus, each.teacher[0].split("=")[0]) for each in given("prefill")}
    assert scored == {(each.source, each.teacher) for each in given("project")}
    ingested = {each.corpus: each.completions for each in given("ingest")}
    assert {*corpora, *(corpus for corpus, _ in scored)} == set(ingested)
    assert all((completions == "context") == ("machine" in corpus) for corpus, completions in ingested.items())


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
