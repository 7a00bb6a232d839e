from __future__ import annotations

import pytest

from potstill.cache.plurals import counted


@pytest.mark.parametrize(
    ("count", "words", "told"),
    [
        (0, ("shard",), "0 shards"),
        (1, ("shard",), "1 shard"),
        (2000, ("duplicate row",), "2,000 duplicate rows"),
        (1, ("entry", "entries"), "1 entry"),
        (3, ("entry", "entries"), "3 entries"),
    ],
)
def test_a_count_of_one_has_no_plural(count: int, words: tuple[str, ...], told: str) -> None:
    assert counted(count, *words) == told
