"""Caches that earlier versions wrote are read for ever."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.corpus.tokenizer_files import SpecialTokens
from potstill.cache.encoding.logprobs import ENCODINGS
from potstill.cache.errors import FormatError
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.store.record import format_version
from potstill.cache.store.root import Root
from potstill.cache.upkeep.garbage import find_garbage
from potstill.cache.upkeep.integrity import corrupt_shard_objects
from tests.golden.make import FILES, JOURNAL_ROW, TEXTS, UNTAUGHT, K
from tests.support.fakes import FakeTeacher
from tests.support.paths import GOLDEN

FORMATS = sorted(GOLDEN.glob("format-*"))


def test_this_version_has_left_its_cache() -> None:
    assert GOLDEN / f"format-{format_version('corpus')}" in FORMATS


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


def test_documents_mask_and_files_of_format_3_read_as_they_were_written() -> None:
    corpus = Cache.open(GOLDEN / "format-3").corpus("docs")
    assert corpus.document_rows.tolist() == [0, 4, 5]
    taught = np.ones(corpus.num_positions, bool)
    for start in corpus.row_starts[[0, 4]].tolist():
        taught[start : start + UNTAUGHT] = False
    assert np.array_equal(corpus.loss_mask(0, corpus.num_positions), taught)
    assert corpus.spec.num_taught == int(taught.sum())
    assert corpus.tokenizer_files == FILES
    ids = [corpus.tokenizer.token_to_id(token) for token in ".!"]
    assert corpus.special_tokens == SpecialTokens(eos=ids[0], pad=ids[1], chat_template=FILES["chat_template.jinja"])
    assert corpus.annotation("even").tolist() == [row % 2 == 0 for row in range(len(corpus))]


def test_fields_beside_the_top_k_read_as_they_were_written() -> None:
    cache = Cache.open(GOLDEN / "format-2")
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
    assert [corrupt_shard_objects(folded, shard) for shard in range(folded.corpus.num_shards)] == [[]] * 3
    commit = tmp_path / "c" / folded.path / "commits" / "000000.json"
    commit.write_bytes(commit.read_bytes().replace(b'"engine": "fake"', b'"engine": "face"'))
    assert "is not the commit that the manifest has" in corrupt_shard_objects(folded, 0)[0]


RECORDS = ["corpora/docs/zarr.json", "targets/u8/docs/ranks.json", "targets/u8/docs/commits/000000.json"]


@pytest.mark.parametrize("path", RECORDS)
def test_an_endless_size_in_a_record_of_format_1_is_a_damaged_record(tmp_path: Path, path: str) -> None:
    shutil.copytree(GOLDEN / "format-1", tmp_path / "c")
    record = tmp_path / "c" / path
    record.write_text(re.sub(r'"size": \d+', '"size": 1e999', record.read_text(), count=1))
    with pytest.raises(FormatError, match=f"{path} is not"):
        Cache.open(tmp_path / "c").targets("u8", "docs").read(0, 5)


@pytest.mark.parametrize(("path", "key"), [(RECORDS[0], "data"), (RECORDS[1], "group"), (RECORDS[2], "segment")])
def test_what_a_flipped_name_in_a_record_of_format_1_may_have_meant_is_no_garbage(
    tmp_path: Path, path: str, key: str
) -> None:
    shutil.copytree(GOLDEN / "format-1", tmp_path / "c")
    segments = tmp_path / "c" / "targets" / "u8" / "docs" / "segments"
    (first,) = segments.glob("000000-*")
    shutil.copytree(first, segments / "000000-0123456789ab")
    record = tmp_path / "c" / path
    flipped, count = re.subn(rf'("{key}": "[^"]*)[0-9a-f]"', r'\1x"', record.read_text())
    assert count == 1
    record.write_text(flipped)
    skipped: list[str] = []
    found = {item.path for item in find_garbage(Root.open(tmp_path / "c"), min_age_seconds=0, on_skip=skipped.append)}
    assert found <= {"targets/u8/docs/segments/000000-0123456789ab"}
    assert [f"{path} names" in line and "which is not there" in line for line in skipped] == [True]
