"""The mark of a complete checkpoint: `.complete`, which names every other file with its size and sha256.

Earlier versions left it empty, and `state.json` with format 1 says so: such a checkpoint is read unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from potstill.cache.errors import FormatError
from potstill.student_trainer.checkpoint.format import load_state
from potstill.student_trainer.config.run_folder import write_json

COMPLETE = ".complete"


def mark(folder: Path) -> None:
    """Mark a checkpoint as complete; all its files are there.

    Raises:
        StoreError: the disk does not take it. OSError: a file cannot be read.
    """
    write_json(folder / COMPLETE, {"files": {name: measured(file) for name, file in _files(folder).items()}})


def damage(checkpoint: Path) -> str:
    """Say in words which file of a marked checkpoint is not what was written; empty where all are."""
    try:
        text = (checkpoint / COMPLETE).read_text(encoding="utf-8")
        if not text:
            return "" if load_state(checkpoint).format == 1 else f"{COMPLETE} is empty"
        return _first_difference(json.loads(text)["files"], _files(checkpoint))
    except FormatError as error:
        return error.detail
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error!r}"


def hashes_of(checkpoint: Path) -> dict[str, dict[str, int | str]]:
    """Read what the mark of a checkpoint says of its files; nothing where it is empty or cannot be read."""
    try:
        found: dict[str, dict[str, int | str]] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))[
            "files"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _first_difference(expected: Mapping[str, Mapping[str, int | str]], files: Mapping[str, Path]) -> str:
    for name, written in expected.items():
        if name not in files:
            return f"{name} is missing"
        found = measured(files[name])
        if found["bytes"] != written["bytes"]:
            return f"{name} has {found['bytes']} bytes in place of {written['bytes']}"
        if found["sha256"] != written["sha256"]:
            return f"{name} has other bytes than were written"
    return ""


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / COMPLETE
    }


def measured(file: Path) -> dict[str, int | str]:
    """Give a file's size and hash, as marks have them."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
