"""Compiled code that is kept on disk is worth only time: damaged or not written, the numbers are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT

DOUBLE = """
import numpy as np
from potstill.cache.compiled import compiled

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
out = np.zeros(4, sys.argv[2])
doubling.double(np.arange(4, dtype=sys.argv[2]), out)
print(out.tolist(), len(doubling.double.stats.cache_hits))
"""


def call(folder: Path, disk: str = "", *, dtype: str = "f8", source: str = DOUBLE) -> tuple[str, str]:
    """What a new process prints and logs that compiles into, or loads from, the folder."""
    (folder / "doubling.py").write_text(source)
    os.utime(folder / "doubling.py", (1, 1))  # not newer each time
    paths = os.pathsep.join([str(folder), str(ROOT)])
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept"), "PYTHONPATH": paths}
    command = [sys.executable, "-c", CALL, disk, dtype]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def flip_at(fraction: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(fraction * (len(data) - 1))] ^= 0x10
        file.write_bytes(data)

    return flip


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    [file] = (path for path in (tmp_path / "kept").rglob("*") if path.is_file())
    damages: list[Callable[[Path], None]] = [flip_at(0.0), flip_at(0.5), lambda file: os.truncate(file, 20)]
    for damage in damages:
        damage(file)
        printed, logged = call(tmp_path)
        assert printed == "[0.0, 2.0, 4.0, 6.0] 0"
        assert "could not be read" in logged
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 1", "")


def test_a_full_disk_is_told_and_keeps_nothing(tmp_path: Path) -> None:
    printed, logged = call(tmp_path, "full")
    assert printed == "[0.0, 2.0, 4.0, 6.0] 0"
    assert "could not be written" in logged
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


def test_each_signature_has_a_file_of_its_own(tmp_path: Path) -> None:
    for dtype in ("f8", "f4", "f8", "f4"):
        printed, logged = call(tmp_path, dtype=dtype)
        assert (printed[:20], logged) == ("[0.0, 2.0, 4.0, 6.0]", "")
    assert printed.endswith(" 1")
    assert len([path for path in (tmp_path / "kept").rglob("*") if path.is_file()]) == 2


def test_a_source_that_changed_is_compiled_again(tmp_path: Path) -> None:
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    assert call(tmp_path, source=DOUBLE.replace("2 *", "3.0 *")) == ("[0.0, 3.0, 6.0, 9.0] 0", "")
