"""The folder of a Ray that is started on this machine: short enough for the sockets that Ray keeps in it."""

from __future__ import annotations

import os

from potstill.cache.errors import InvalidInput

_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux."""
_BELOW = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""What Ray puts below the folder, at the longest process id."""
_ROOM = _PATH_BYTES - _BELOW
_SHORT = "/tmp"  # noqa: S108 -- where Ray itself goes without a TMPDIR


def ray_folder() -> str | None:
    """Choose the `_temp_dir` of `ray.init`: None where Ray's own choice will do.

    Raises:
        InvalidInput: RAY_TMPDIR is too long, or TMPDIR is and /tmp cannot be written.
    """
    asked = os.environ.get("RAY_TMPDIR")
    if asked:
        if _fits(asked):
            return None
        raise InvalidInput(_told("RAY_TMPDIR", asked))
    folder = os.environ.get("TMPDIR", "")
    if _fits(folder):
        return None
    if not os.access(_SHORT, os.W_OK | os.X_OK):
        raise InvalidInput(_told("TMPDIR", folder))
    return f"{_SHORT}/ray"


def _fits(folder: str) -> bool:
    return len(os.fsencode(folder)) <= _ROOM


def _told(name: str, folder: str) -> str:
    return (
        f"{name} is {folder!r}, {len(os.fsencode(folder))} bytes; the paths of Ray's sockets leave it {_ROOM}: "
        "set RAY_TMPDIR to a shorter folder"
    )
