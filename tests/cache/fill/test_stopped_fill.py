"""A stopped fill of a small corpus: what it keeps, and what it says of the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.commands.prefill import fill_with_progress
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.writing import fitting_shard_positions
from potstill.cache.fill import FillPlan
from potstill.cache.types import TeacherIdentity, Tokens
from tests.support.corpora import VOCAB, byte_tokenizer, teacher_for
from tests.support.fakes import FakeTeacher


class StopsAfter(FakeTeacher):
    """Answers a number of tokens, and nothing from then on."""

    def __init__(self, identity: TeacherIdentity, tokens: int) -> None:
        super().__init__(identity)
        self.left = tokens
        self.reached = asyncio.Event()

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        self.left -= sum(len(row) for row in rows)
        if self.left < 0:
            self.reached.set()
            await asyncio.Event().wait()
        return await super().score(rows, want)


def corpus_of(root: Path, positions: int) -> tuple[Cache, Corpus]:
    cache = Cache.open(root, "r+")
    tokens = np.random.default_rng(0).integers(0, VOCAB, positions, dtype=np.uint32)
    rows = np.split(tokens, range(100, positions, 100))
    return cache, ingest_rows(cache.root, "docs", rows, byte_tokenizer(), IngestPlan(row_tokens=100))


async def test_a_fill_of_a_small_corpus_keeps_most_of_what_it_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, corpus = corpus_of(tmp_path / "c", 24_000)
    assert corpus.num_shards == 6
    teacher = StopsAfter(teacher_for(corpus).identity, 10_000)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=4))
    work = asyncio.create_task(fill_with_progress(teacher, targets, FillPlan(batch_tokens=1000)))
    await teacher.reached.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    kept = int(targets.committed.sum())
    assert kept >= 1
    told = capsys.readouterr().out
    assert f"fake: stopped; {kept} of 6 shards committed so far, " in told
    dropped = told.partition("so far, ")[2].partition(" scored tokens of unfinished shards dropped, ")[0]
    assert 0 < int(dropped.replace(",", "")) <= 10_000 - kept * 4000
    assert "goes on with the rest" in told


@pytest.mark.parametrize(
    ("positions", "size"),
    [(1, 4096), (50_000, 4096), (1 << 20, 1 << 14), (3_600_000, 56_250), (1 << 26, 1 << 20), (10**12, 1 << 20)],
)
def test_shards_are_a_64th_of_a_corpus_within_bounds(positions: int, size: int) -> None:
    assert fitting_shard_positions(positions) == size


def test_a_size_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "c", "r+")
    rows = [np.arange(50, dtype=np.uint32)] * 10
    made = ingest_rows(cache.root, "own", rows, byte_tokenizer(), IngestPlan(row_tokens=50, shard_positions=100))
    assert made.num_shards == 5
