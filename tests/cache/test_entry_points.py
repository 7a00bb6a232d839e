from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cache.entry_points import command_entry_points, name_and_model
from potstill.cache.errors import InvalidInput


def test_a_teacher_argument() -> None:
    assert name_and_model("far=http://h:1#x=y") == ("far", "http://h:1#x=y")
    for bad in ("smol", "=m", "smol=", ""):
        with pytest.raises(InvalidInput, match="--teacher .*: write NAME=MODEL"):
            name_and_model(bad)


def test_a_package_is_known_for_as_long_as_it_is_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = command_entry_points()
    info = tmp_path / "extra-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[potstill.commands]\nshout = shout\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert set(command_entry_points()) == {*before, "shout"}
    assert command_entry_points() == before
