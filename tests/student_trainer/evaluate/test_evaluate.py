"""Evaluations of rows that leave something out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.clients.cli import main
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, fill, write_texts_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_rows_without_a_label_have_no_cross_entropy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_texts_cache(tmp_path, [f"w{i}" for i in range(1, 20)])
    fill(root, "fake")
    result = train(config_of(root, tmp_path / "run", train={"steps": 1}))
    assert result.held_out is not None
    assert result.held_out.ce is None
    assert result.held_out.teachers["fake"].kl > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]["ce"] is None
    assert [record["held_out"]["ce"] for record in read_metrics(tmp_path / "run") if "held_out" in record] == [None] * 2
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "cross-entropy - nats/token" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ce"] is None
