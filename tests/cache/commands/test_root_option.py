from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import refused, run

OTHERS = {
    "annotate": ["--corpus", "c"],
    "compact": ["--corpus", "c", "--teacher", "t"],
    "delete": ["--teacher", "t"],
    "doctor": [],
    "estimate": [],
    "export": ["--corpus", "c", "--teacher", "t", "--to", "f"],
    "gc": ["--dry-run"],
    "inspect": ["--json"],
    "prefill": ["--corpus", "c", "--teacher", "t=m"],
    "verify": ["--json"],
}
"""Every command that looks at a cache and takes no other positional argument, with what else it has to be told."""
OPTIONAL = ("doctor", "estimate")


@pytest.mark.parametrize("command", [name for name in OTHERS if name != "doctor"])
def test_a_cache_is_named_in_any_place_with_and_without_the_option(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, others = tmp_path / "absent", OTHERS[command]
    ways = ([absent, *others], [*others, absent], ["--cache", absent, *others], [*others, "--cache", absent])
    told = {refused(capsys, command, *way) for way in ways}
    assert len(told) == 1
    assert f"no cache at {str(absent)!r}" in told.pop()
    assert not absent.exists()


def test_the_doctor_looks_at_a_cache_named_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for way in (["--json", tmp_path / "absent"], ["--cache", tmp_path / "absent", "--json"]):
        assert run("doctor", *way) == 1
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "no cache at" in told[0]


def test_what_estimate_measures_has_an_older_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no cache at" in refused(capsys, "estimate", "--like", tmp_path / "absent")


@pytest.mark.parametrize("command", OTHERS)
def test_a_cache_named_twice_or_not_at_all_is_wrong_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(command, "a", "--cache", "b", *OTHERS[command])
    assert left.value.code == 2
    assert "not allowed with argument ROOT" in capsys.readouterr().err.splitlines()[-1]
    if command not in OPTIONAL:
        with pytest.raises(SystemExit) as left:
            run(command, *OTHERS[command])
        assert left.value.code == 2
        assert "one of the arguments ROOT --cache is required" in capsys.readouterr().err.splitlines()[-1]
