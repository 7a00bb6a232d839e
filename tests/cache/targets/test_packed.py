"""The `archive` encoding in segments: several blocks, rows that cross them, and the labels they share."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.encoding.archive.codes import BLOCK_POSITIONS
from potstill.cache.targets.target_set import TargetSet
from tests.support.corpora import make_corpus, teacher_for, topics

FIELDS = Fields(k=3, draws=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, list[Targets], TargetSet]:
    """One shard of several blocks; rows of 1,000 tokens do not end where blocks do."""
    root = tmp_path_factory.mktemp("packed") / "c"
    cache, corpus = make_corpus(root, texts=topics(55), row_tokens=1000, shard_positions=1 << 20)
    teacher = teacher_for(corpus)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=FIELDS, encoding="archive")
    exact = asyncio.run(teacher.score(corpus.rows(0, len(corpus)), FIELDS))
    assert targets.write_shard(0, Targets.concat(exact), teacher.provenance)
    assert corpus.num_positions > 2 * BLOCK_POSITIONS
    return corpus, exact, Cache.open(root).targets("fake", "docs")


def test_every_row_reads_as_it_was_scored_also_across_blocks(
    written: tuple[Corpus, list[Targets], TargetSet],
) -> None:
    corpus, scored, targets = written
    bound = targets.encoding.max_abs_error
    for read, exact in zip(targets.read_rows(range(len(corpus))), scored, strict=True):
        assert np.abs(read.logprobs - exact.logprobs).max() <= bound
        assert np.isnan(read.label_logprob[-1])
        np.testing.assert_allclose(read.label_logprob[:-1], exact.label_logprob[:-1], atol=2 * bound)
        assert read.draws is not None
        assert exact.draws is not None
        np.testing.assert_array_equal(read.draws.offsets, exact.draws.offsets)
        np.testing.assert_array_equal(read.draws.ids, exact.draws.ids)
        np.testing.assert_array_equal(read.draws.counts, exact.draws.counts)


def test_any_range_gives_the_same_bits(written: tuple[Corpus, list[Targets], TargetSet]) -> None:
    corpus, _, targets = written
    whole = targets.read(0, corpus.num_positions)
    for start in (0, BLOCK_POSITIONS - 3, BLOCK_POSITIONS, 2 * BLOCK_POSITIONS - 1):
        part = targets.read(start, start + 10)
        for name in ("ids", "logprobs", "log_tail", "label_logprob"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[start : start + 10])


def test_a_commit_records_the_error_of_what_is_read(written: tuple[Corpus, list[Targets], TargetSet]) -> None:
    _, _, targets = written
    (commit,) = targets.sets[0].commits.all()
    assert 0 < commit.error["max_abs"] <= targets.encoding.max_abs_error
