"""Compiled code that is kept on disk is worth only time: kept or not, the numbers are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
import numpy as np
import doubling
out = np.zeros(4, dtype)
doubling.double(np.arange(4, dtype=dtype), out)
print(out.tolist(), len(doubling.double.stats.cache_hits))
"""
FORKING = f"""
import json, os, sys
import numba
from potstill.cache.compiled import compiled

numba.njit(lambda values, out: len(values) + len(out))([1.0], [1.0])
for line in sys.stdin:
    asked = json.loads(line)
    if (child := os.fork()) == 0:
        os.environ.update(asked["variables"])
        numba.config.reload_config()
        sys.path.insert(0, asked["folder"])
        for number, name in enumerate(("printed", "logged"), 1):
            os.dup2(os.open(os.path.join(asked["folder"], name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        exec({CALL!r}, {{"dtype": asked["dtype"]}})
        sys.stdout.flush()
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Processes that begin with numba imported, which takes longer than all else, and with none of our code compiled."""


class Processes:
    """New processes, one for each call, that compile into, or load from, a folder."""

    def __init__(self, parent: subprocess.Popen[str]) -> None:
        self._parent = parent

    def call(
        self, folder: Path, *, dtype: str = "f8", source: str = DOUBLE, home: Path | None = None
    ) -> tuple[str, str]:
        """What the process prints and logs."""
        (folder / "doubling.py").write_text(source)
        os.utime(folder / "doubling.py", (1, 1))  # not newer each time
        variables = {"NUMBA_CACHE_DIR": str(folder / "kept")}
        if home is not None:
            variables |= {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps({"folder": str(folder), "variables": variables, "dtype": dtype}), file=self._parent.stdin)
        self._parent.stdin.flush()
        status = self._parent.stdout.readline()
        printed, logged = ((folder / name).read_text() for name in ("printed", "logged"))
        assert status == "0\n", logged
        return printed.strip(), logged


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    command = [sys.executable, "-c", FORKING]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        yield Processes(parent)
        assert parent.stdin is not None
        parent.stdin.close()


def kept(folder: Path) -> list[Path]:
    """The files of compiled code in a folder."""
    return list(folder.rglob("*.nbc"))


def test_a_second_process_loads_what_the_first_compiled(processes: Processes, tmp_path: Path) -> None:
    assert processes.call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    assert len(kept(tmp_path / "kept")) == 1
    assert processes.call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 1", "")


@pytest.mark.parametrize("home_is_a_file", [False, True])
def test_where_the_package_cannot_be_written_it_compiles_all_the_same(
    processes: Processes, tmp_path: Path, home_is_a_file: bool
) -> None:
    # Files in the place of folders: what may be written does not depend on who runs the test.
    (tmp_path / "kept").write_text("")
    (tmp_path / "__pycache__").write_text("")
    home = tmp_path / "home"
    home.write_text("") if home_is_a_file else home.mkdir()
    again = [processes.call(tmp_path, home=home) for _ in range(2)]
    hits = 0 if home_is_a_file else 1
    assert again == [("[0.0, 2.0, 4.0, 6.0] 0", ""), (f"[0.0, 2.0, 4.0, 6.0] {hits}", "")]


def test_each_signature_has_a_file_of_its_own(processes: Processes, tmp_path: Path) -> None:
    for dtype in ("f8", "f4", "f8", "f4"):
        printed, logged = processes.call(tmp_path, dtype=dtype)
        assert (printed[:20], logged) == ("[0.0, 2.0, 4.0, 6.0]", "")
    assert printed.endswith(" 1")
    assert len(kept(tmp_path / "kept")) == 2


def test_a_source_that_changed_is_compiled_again(processes: Processes, tmp_path: Path) -> None:
    assert processes.call(tmp_path) == ("[0.0, 2.0, 4.0, 6.0] 0", "")
    assert processes.call(tmp_path, source=DOUBLE.replace("2 *", "3.0 *")) == ("[0.0, 3.0, 6.0, 9.0] 0", "")


def test_on_a_full_disk_it_compiles_all_the_same_and_says_so(processes: Processes, tmp_path: Path) -> None:
    # What numba writes goes to a device that is always full.
    full = f"""
import builtins
opened = builtins.open
builtins.open = lambda path, *args, **kwargs: opened("/dev/full" if ".tmp." in str(path) else path, *args, **kwargs)
{DOUBLE}
"""
    for _ in range(2):
        printed, logged = processes.call(tmp_path, source=full)
        assert printed == "[0.0, 2.0, 4.0, 6.0] 0"
        assert logged.count("\n") == 1
        assert "the compiled code of double is not kept for other processes: [Errno 28]" in logged
    assert kept(tmp_path / "kept") == []
