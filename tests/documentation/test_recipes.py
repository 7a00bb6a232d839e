"""The recipes: their configs are read as the commands read them, and pages say what `potstill estimate` says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from potstill.clients.cli import main
from potstill.student_trainer.config import TrainConfig
from tests.documentation.blocks import blocks_of
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
LARGE = RECIPES / "lokilm-1.4b"


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.toml")), ids=lambda file: str(file.relative_to(RECIPES)))
def test_each_config_is_one(file: Path) -> None:
    config = TrainConfig.from_toml(file)
    assert {corpus.name for corpus in config.data.corpora}


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
