from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from potstill.cache.commands.tables import table_text
from tests.support.command_line import run
from tests.support.paths import ROOT

COLUMNS = ("teacher", "shards", "bytes")
ROWS = [("small", 3, "1,024"), ("large", 30, "20,480")]


def test_a_table_that_fits_has_a_line_a_row() -> None:
    assert table_text(COLUMNS, ROWS, 23) == "teacher  shards  bytes\nsmall    3       1,024\nlarge    30      20,480"


def test_a_wider_one_is_turned() -> None:
    assert table_text(COLUMNS, ROWS, 22) == "teacher  small  large\nshards   3      30\nbytes    1,024  20,480"


def test_one_that_does_not_fit_either_way_has_its_rows_one_below_the_other() -> None:
    told = table_text(COLUMNS, ROWS, 20)
    assert told == "teacher  small\nshards   3\nbytes    1,024\n\nteacher  large\nshards   30\nbytes    20,480"
    assert table_text(COLUMNS, ROWS, 1) == told, "no word is broken, however narrow the terminal is"


def test_a_table_without_rows_has_its_headings() -> None:
    assert table_text(COLUMNS, [], 80) == "teacher  shards  bytes"


@pytest.mark.parametrize("columns", [80, 100, 250])
@pytest.mark.parametrize(
    "command", [["inspect", ROOT / "tests/golden/format-2"], ["estimate", "--positions", "500B", "--teachers", "3"]]
)
def test_no_table_of_a_command_is_wider_than_the_terminal(
    command: list[str | Path], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(*command) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns


def test_a_pipe_is_as_wide_as_a_small_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with Path(os.devnull).open("w") as nowhere:
        monkeypatch.setattr(sys, "__stdout__", nowhere)
        assert run("inspect", ROOT / "tests/golden/format-2") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
