"""Compiled code that is kept on disk is worth only time: damaged or not written, the numbers are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DOUBLE = """
import numpy as np
from cache.compiled import compiled

@compiled
def double(values, out):
    for i in range(len(values)):
        out[i] = 2 * values[i]
"""
CALL = """
import resource, signal, sys
import numpy as np
import doubling
if sys.argv[1] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
out = np.zeros(4)
doubling.double(np.arange(4.0), out)
print(out.tolist(), len(doubling.double.stats.cache_hits))
"""


def call(folder: Path, disk: str = "") -> tuple[str, str]:
    """What a new process prints and logs that compiles into, or loads from, the folder."""
    (folder / "doubling.py").write_text(DOUBLE)
    os.utime(folder / "doubling.py", (1, 1))  # numba compiles anew what changed
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept"), "PYTHONPATH": paths}
    command = [sys.executable, "-c", CALL, disk]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [flip, lambda file: os.truncate(file, 20), lambda file: os.truncate(file, 0)])
def test_damaged_files_are_made_anew(tmp_path: Path, suffix: str, damage: Callable[[Path], None]) -> None:
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 1", "")
    [file] = (tmp_path / "kept").rglob(f"*.{suffix}")
    damage(file)
    printed, logged = call(tmp_path)
    assert printed == "[0.0, 2.0, 4.0, 6.0] 0"
    assert "could not be read" in logged
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 1", "")


def test_a_full_disk_is_told_and_keeps_nothing(tmp_path: Path) -> None:
    printed, logged = call(tmp_path, "full")
    assert printed == "[0.0, 2.0, 4.0, 6.0] 0"
    assert "could not be written" in logged
    assert not list((tmp_path / "kept").rglob("*.nbc"))
