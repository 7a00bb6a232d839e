"""A further field of floats is two attributes, an entry of the table and a codec: nothing else has to name it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

ADDED = (
    ("fields.py", "    def __post_init__", "    margin: bool = False\n\n"),
    (
        "fields.py",
        ')\n"""The table,',
        '    Field(name="margin", attributes={"margin": "keep the margin"}, shape=lambda _, __: ()),\n',
    ),
    ("types.py", "    draws: Draws | None = None\n", "    margin: NDArray[np.float32] | None = None\n"),
    (
        "encoding/fields.py",
        '    "dense": FloatCodec(',
        """\
    "margin": FloatCodec(
        lambda values, *_: "" if (values >= 0).all() else "a margin is below 0",
        lambda values, *_: values.astype(np.float32),
    ),
""",
    ),
)
"""A file of `cache/`, what stands there, and what is written in front of it."""


def test_a_sixth_field_goes_everywhere(tmp_path: Path) -> None:
    """Kept beside a top-k, verified, sent over HTTP, exported and imported, asked for by an option."""
    changed = tmp_path / "changed"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "potstill", changed / "potstill", ignore=skip)
    for name, before, text in ADDED:
        path = changed / "potstill" / "cache" / name
        source = path.read_text()
        assert source.count(before) == 1, f"{name} has {before!r} {source.count(before)} times"
        path.write_text(source.replace(before, text + before))
    paths = os.pathsep.join([str(changed), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.support.processes.sixth_field", str(tmp_path / "c")]
    settings = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=changed, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
