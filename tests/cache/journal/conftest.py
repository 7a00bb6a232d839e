"""An empty cache root for each test of the journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cache.store.root import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root.open(tmp_path / "c", create=True)
