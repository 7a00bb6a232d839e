"""A wheel holds `potstill` alone, so that nothing of its user's hides it and it hides nothing of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = """
import asyncio
import cache, clients
import potstill
from potstill import Cache, Fields, HttpCache, HttpTeacher, PotstillError, Targets
from potstill.student_trainer.losses import distillation_loss

assert (cache.MINE, clients.MINE) == (1, 2)
assert potstill.__file__.startswith(sys.argv[1]), potstill.__file__
assert Cache.open("nothing", mode="r+").corpora() == []
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked to, as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_holds_one_package(installed: Path) -> None:
    assert sorted(path.name.partition("-")[0] for path in installed.iterdir()) == ["potstill", "potstill"]


def test_it_holds_every_file_of_the_four_packages(installed: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "cache", "clients", "student_trainer", "teacher_service"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert not [name for name in tracked if not (installed / "potstill" / name).is_file()]


def test_modules_of_its_users_do_not_hide_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.py").write_text("MINE = 1\n")
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "__init__.py").write_text("MINE = 2\n")
    (tmp_path / "script.py").write_text("import sys\n" + SCRIPT)
    subprocess.run(
        [sys.executable, "script.py", str(installed)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
    )
