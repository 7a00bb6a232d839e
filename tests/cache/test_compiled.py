"""Compiled code that is kept on disk is worth only time: kept or not, the numbers are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
import sys
import numpy as np
import doubling
out = np.zeros(4, sys.argv[1])
doubling.double(np.arange(4, dtype=sys.argv[1]), out)
print(out.tolist(), len(doubling.double.stats.cache_hits))
"""


def call(folder: Path, *, dtype: str = "f8", source: str = DOUBLE, home: Path | None = None) -> tuple[str, str]:
    """What a new process prints and logs that compiles into, or loads from, the folder."""
    (folder / "doubling.py").write_text(source)
    os.utime(folder / "doubling.py", (1, 1))  # not newer each time
    paths = os.pathsep.join([str(folder), str(ROOT)])
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept"), "PYTHONPATH": paths}
    if home is not None:
        settings |= {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-c", CALL, dtype]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def kept(folder: Path) -> list[Path]:
    """The files of compiled code in a folder."""
    return list(folder.rglob("*.nbc"))


def test_a_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    assert len(kept(tmp_path / "kept")) == 1
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 1", "")


@pytest.mark.parametrize("home_is_a_file", [False, True])
def test_where_the_package_cannot_be_written_it_compiles_all_the_same(tmp_path: Path, home_is_a_file: bool) -> None:
    # Files in the place of folders: what may be written does not depend on who runs the test.
    (tmp_path / "kept").write_text("")
    (tmp_path / "__pycache__").write_text("")
    home = tmp_path / "home"
    home.write_text("") if home_is_a_file else home.mkdir()
    again = [call(tmp_path, home=home) for _ in range(2)]
    hits = 0 if home_is_a_file else 1
    assert again == [("[0.0, 2.0, 4.0, 6.0] 0", ""), (f"[0.0, 2.0, 4.0, 6.0] {hits}", "")]


def test_each_signature_has_a_file_of_its_own(tmp_path: Path) -> None:
    for dtype in ("f8", "f4", "f8", "f4"):
        printed, logged = call(tmp_path, dtype=dtype)
        assert (printed[:20], logged) == ("[0.0, 2.0, 4.0, 6.0]", "")
    assert printed.endswith(" 1")
    assert len(kept(tmp_path / "kept")) == 2


def test_a_source_that_changed_is_compiled_again(tmp_path: Path) -> None:
    assert call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    assert call(tmp_path, source=DOUBLE.replace("2 *", "3.0 *")) == ("[0.0, 3.0, 6.0, 9.0] 0", "")


def test_on_a_full_disk_it_compiles_all_the_same_and_says_so(tmp_path: Path) -> None:
    # What numba writes goes to a device that is always full.
    full = f"""
import builtins
opened = builtins.open
builtins.open = lambda path, *args, **kwargs: opened("/dev/full" if ".tmp." in str(path) else path, *args, **kwargs)
{DOUBLE}
"""
    for _ in range(2):
        printed, logged = call(tmp_path, source=full)
        assert printed == "[0.0, 2.0, 4.0, 6.0] 0"
        assert logged.count("\n") == 1
        assert "the compiled code of double is not kept for other processes: [Errno 28]" in logged
    assert kept(tmp_path / "kept") == []
