"""The folder of a Ray that is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cache.errors import InvalidInput
from potstill.cache.ray_folder import ray_folder


def test_a_long_tmpdir_is_left_for_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert ray_folder() is None
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert ray_folder() is None
    monkeypatch.setenv("TMPDIR", "/" + "long" * 20)
    assert ray_folder() == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    assert ray_folder() is None


def test_no_folder_that_is_allowed_leaves_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "é" * 30)
    with pytest.raises(InvalidInput, match=r"RAY_TMPDIR is .* 61 bytes; .* leave it \d+: set RAY_TMPDIR to a shorter"):
        ray_folder()


def test_the_room_is_that_of_the_longest_socket(tmp_path: Path) -> None:
    from potstill.cache.ray_folder import _ROOM

    longest = "/" + "a" * (_ROOM - 1) + "/ray/session_2026-12-31_23-59-59_123456_4194304/sockets/plasma_store.1"
    assert len(longest) == 107
