from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
from hypothesis import given, strategies as st

from potstill.cache import Cache, Fields, Targets
from potstill.cache.errors import StoreError
from potstill.cache.store.groups import Reading
from potstill.cache.store.root import LONGEST_NAME, Root
from potstill.teacher_service.hosting.coverage import MAX_CELLS, Coverage, fold, read_coverage
from tests.support.corpora import make_corpus, plan_targets, teacher_for


@given(st.lists(st.booleans(), max_size=1500))
def test_cells_share_the_shards_out_and_lose_none(done: list[bool]) -> None:
    cells = fold(np.array(done, bool))
    assert len(cells) == min(len(done), MAX_CELLS)
    edges = [c * len(done) // max(len(cells), 1) for c in range(len(cells) + 1)]
    expected = [np.mean(done[a:b]) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(cells, expected, atol=6e-5)


def test_a_hundred_thousand_shards_are_two_hundred_cells() -> None:
    done = np.zeros(100_000, bool)
    done[:25_250] = True
    cells = fold(done)
    assert len(cells) == 200
    assert cells[:51] == (1.0,) * 50 + (0.5,)
    assert set(cells[51:]) == {0.0}


async def test_a_cache_is_read_again_but_not_all_the_time(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "cache")
    coverage = Coverage(cache)
    first = await coverage.latest()
    assert first is not None
    assert [(each.corpus, each.shards, each.teachers) for each in first] == [("docs", corpus.num_shards, ())]
    plan_targets(cache, teacher_for(corpus))
    assert await coverage.latest() is first
    coverage._next = 0.0
    second = await coverage.latest()
    assert second is not None
    assert second[0].positions == corpus.num_positions


class Away(Root):
    """A store that does not answer."""

    def folders(self, prefix: str, *, longest: int = LONGEST_NAME) -> list[str]:
        raise StoreError("the store is not reached")


async def test_what_was_read_stays_while_the_store_is_away(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "cache")
    coverage = Coverage(cache)
    before = await coverage.latest()
    away = Cache(Away.open(tmp_path / "cache"), "r", Reading.open(0))
    coverage._next, coverage._cache = 0.0, away
    assert await coverage.latest() is before
    assert coverage.error == "the store is not reached"


def test_a_damaged_target_set_does_not_hide_the_others(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "cache")
    teacher = teacher_for(corpus)
    targets = Targets.concat([teacher.distribution(row, 4) for row in corpus.rows(0, int(corpus.shard_rows[1]))])
    for name in ("good", "bad"):
        planned = cache.plan_targets(name, "docs", teacher.identity, fields=Fields(k=4))
        planned.write_shard(0, targets, teacher.provenance)
    (tmp_path / "cache" / "targets" / "bad" / "docs" / "zarr.json").write_text("{")
    (found,) = read_coverage(cache)
    bad, good = found.teachers
    assert (good.teacher, good.committed, good.error) == ("good", 1, "")
    assert (bad.teacher, bad.committed, bad.cells) == ("bad", 0, ())
    assert "targets/bad/docs" in bad.error


async def test_without_a_cache_there_is_nothing() -> None:
    assert await asyncio.wait_for(Coverage(None).latest(), 1) == ()
