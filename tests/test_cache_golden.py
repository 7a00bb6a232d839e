"""Caches that earlier versions wrote are read for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cache import Cache, Fields
from cache.cached import CachedTeacher, KeepPolicy
from cache.encoding import ENCODINGS
from cache.fill import FillPlan, fill
from cache.record import FORMAT_VERSION
from tests.fakes import FakeTeacher
from tests.golden.make import JOURNAL_ROW, TEXTS, K

GOLDEN = Path(__file__).resolve().parent / "golden"
FORMATS = sorted(GOLDEN.glob("format-*"))


def test_this_version_has_left_its_cache() -> None:
    assert GOLDEN / f"format-{FORMAT_VERSION}" in FORMATS


@pytest.mark.parametrize("root", FORMATS, ids=lambda root: root.name)
def test_a_cache_of_every_format_reads_as_it_was_written(root: Path, tmp_path: Path) -> None:
    cache = Cache.open(root)
    corpus = cache.corpus("docs")
    rows = corpus.rows(0, len(corpus))
    assert corpus.corrupt_objects() == []
    assert "".join(corpus.tokenizer.decode(row.tolist()) for row in rows) == "".join(TEXTS)
    for name in cache.teachers("docs"):
        targets = cache.targets(name, "docs").top_k_only()
        assert name == targets.encoding.name
        teacher = FakeTeacher(targets.identity)
        for row, read in zip(rows, targets.read_rows(range(len(rows))), strict=True):
            exact = teacher.distribution(row, K)
            if name != "archive":
                assert np.array_equal(read.ids, exact.ids)
            assert np.abs(read.logprobs - exact.logprobs).max() <= targets.encoding.max_abs_error + 1e-6


@pytest.mark.parametrize("root", [root for root in FORMATS if root.name != "format-1"], ids=lambda root: root.name)
def test_fields_beside_the_top_k_read_as_they_were_written(root: Path) -> None:
    cache = Cache.open(root)
    corpus = cache.corpus("docs")
    assert corpus.annotation("even").tolist() == [row % 2 == 0 for row in range(len(corpus))]
    for name in ENCODINGS:
        targets = cache.targets(name, "docs")
        teacher = FakeTeacher(targets.identity)
        for row in range(len(corpus)):
            read, exact = targets.read_rows([row])[0], teacher.targets(corpus.row(row), targets.fields)
            assert read.draws is not None
            assert exact.draws is not None
            assert np.array_equal(read.draws.ids, exact.draws.ids)
            assert np.array_equal(read.draws.counts, exact.draws.counts)
            for field in ("entropy", "log_z", "dense"):
                np.testing.assert_allclose(getattr(read, field), getattr(exact, field), atol=0.016)


async def test_its_journal_answers_without_the_teacher(tmp_path: Path) -> None:
    for root in FORMATS:
        shutil.copytree(root, tmp_path / root.name)
        cache = Cache.open(tmp_path / root.name, mode="r+")
        teacher = FakeTeacher(cache.targets("u8", "docs").identity)
        async with CachedTeacher.open(teacher, name="asked", cache=cache, policy=KeepPolicy(k=K)) as cached:
            await cached.score([JOURNAL_ROW], Fields(k=K))
        assert teacher.scored == []


async def test_a_set_of_format_1_that_is_filled_on_and_folded_verifies(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-1", tmp_path / "c")
    (tmp_path / "c" / "targets" / "u8" / "docs" / "commits" / "000001.json").unlink()
    cache = Cache.open(tmp_path / "c", mode="r+")
    teacher = FakeTeacher(cache.targets("u8", "docs").identity)
    await fill(teacher, cache.plan_targets("u8", "docs", teacher.identity, fields=Fields(k=K)), FillPlan())
    (folded,) = cache.targets("u8", "docs").sets
    assert (tmp_path / "c" / folded.path / "manifest.json").exists()
    assert [folded.corrupt_objects(shard) for shard in range(folded.corpus.num_shards)] == [[]] * 3
    commit = tmp_path / "c" / folded.path / "commits" / "000000.json"
    commit.write_bytes(commit.read_bytes().replace(b'"engine": "fake"', b'"engine": "face"'))
    assert "is not the commit that the manifest has" in folded.corrupt_objects(0)[0]
