from __future__ import annotations

import argparse
import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.commands import verify
from potstill.cache.errors import InvalidInput
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.journal.segment import journal_records
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.scored_rows import assert_same, row
from tests.support.waiting import eventually

POLICY = KeepPolicy(k=16)
WANT = Fields(k=16)


def verified(cache: Cache) -> int:
    """The exit status of `potstill verify`."""
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([cache.root.url]))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "c", mode="r+")


async def test_a_row_asked_for_twice_is_scored_once_and_answered_alike_also_after_a_restart(cache: Cache) -> None:
    teacher = FakeTeacher()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        (first,) = await cached.score([row(1, 2, 3)], WANT)
        (second,) = await cached.score([row(1, 2, 3)], WANT)
        assert (cached.counters.misses, cached.counters.hits) == (1, 1)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        (third,) = await cached.score([row(1, 2, 3)], WANT)
    assert len(teacher.scored) == 1
    assert_same(first, second)
    assert_same(first, third)
    exact = teacher.distribution(row(1, 2, 3), 16)
    assert np.array_equal(first.ids, exact.ids)
    assert np.abs(first.logprobs - exact.logprobs).max() <= 0.0635


async def test_a_smaller_k_is_a_hit_and_a_larger_one_is_scored_again_without_changing_the_first(
    cache: Cache,
) -> None:
    teacher = FakeTeacher()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        (small,) = await cached.score([row(5, 6)], Fields(k=4))
        (kept,) = await cached.score([row(5, 6)], WANT)
        assert_same(kept.prefix(4), small)
        assert len(teacher.scored) == 1
        (large,) = await cached.score([row(5, 6)], Fields(k=32))
        assert large.k == 32
        assert len(teacher.scored) == 2
        assert_same((await cached.score([row(5, 6)], WANT))[0], kept)


async def test_a_committed_corpus_answers_without_the_teacher_also_when_it_is_filled_later(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    async with CachedTeacher.open(teacher, name="fake", cache=cache, policy=POLICY) as cached:
        await cached.score([row(9, 9, 9)], WANT)
        writer = teacher_for(corpus)
        await fill(writer, plan_targets(cache, writer), FillPlan())
        cached._known.look_again()  # as if the refresh time had passed
        teacher.scored.clear()
        answers = await cached.score([corpus.row(4), corpus.row(9)], WANT)
        assert teacher.scored == []
        stored = cache.targets("fake", "docs").read_rows([4, 9])
        for a, b in zip(answers, stored, strict=True):
            assert_same(a, b)


async def test_another_identity_under_the_same_name_never_answers_for_this_one(cache: Cache) -> None:
    old, new = FakeTeacher(), FakeTeacher(fake_identity(model="retrained"))
    async with CachedTeacher.open(old, name="smol", cache=cache, policy=POLICY) as cached:
        await cached.score([row(1)], WANT)
    async with CachedTeacher.open(new, name="smol", cache=cache, policy=POLICY) as cached:
        await cached.score([row(1)], WANT)
    assert len(new.scored) == 1


async def test_a_damaged_journal_is_scored_again_and_named_by_verify(
    cache: Cache, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = FakeTeacher()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        await cached.score([row(1, 2)], WANT)
    gaps = next(Path(cache.root.url).rglob("gaps/c/0/0"))
    data = bytearray(gaps.read_bytes())
    data[3] ^= 1
    gaps.write_bytes(data)
    assert verified(cache) == 1
    assert "gaps/c/0/0 has sha256" in capsys.readouterr().out
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        assert (await cached.score([row(1, 2)], WANT))[0].num_positions == 2
        assert "its rows are scored again" in caplog.text
        await cached.score([row(1, 2)], WANT)
    assert len(teacher.scored) == 2, "scored again once, then kept again"


async def test_rows_are_stored_when_they_have_waited_long_enough(cache: Cache) -> None:
    policy = KeepPolicy(k=16, segment_seconds=0.1)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        await cached.score([row(1, 2)], WANT)
        await eventually(lambda: any(Path(cache.root.url).rglob("smol-*.json")))
        assert len(list(Path(cache.root.url).rglob("smol-*.json"))) == 1
        (again,) = await cached.score([row(1, 2)], WANT)
        assert again.num_positions == 2
        assert cached.counters.hits == 1


@pytest.mark.parametrize("encoding", ["u8", "f16", "f32"])
async def test_an_answer_is_what_is_read_back_in_every_encoding(cache: Cache, encoding: str) -> None:
    policy = KeepPolicy(k=16, encoding=encoding)
    rows = [row(*range(i, i + 40)) for i in range(20)]
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        first = await cached.score(rows, WANT)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        again = await cached.score(rows, WANT)
        assert cached.counters.misses == 0
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)


async def test_a_store_that_takes_nothing_costs_neither_answers_nor_memory(cache: Cache) -> None:
    policy = KeepPolicy(k=16, segment_seconds=0.05)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        blocker = Path(cache.root.url) / "journal"
        blocker.write_text("not a folder")
        for i in range(5):
            await cached.score([row(i)], WANT)
        await eventually(lambda: cached.store_error != "")
        assert "journal" in cached.store_error
        blocker.unlink()
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        await cached.score([row(i) for i in range(5)], WANT)
        assert cached.counters.hits == 5, "kept once the store was mended"


async def test_a_cache_opened_to_read_and_bad_policies_are_refused(cache: Cache) -> None:
    with pytest.raises(InvalidInput, match="a service needs mode 'r\\+'"):
        async with CachedTeacher.open(FakeTeacher(), name="smol", cache=Cache.open(cache.root.url)):
            pass
    with pytest.raises(InvalidInput, match="k is 0; it must be at least 1"):
        KeepPolicy(k=0)
    with pytest.raises(InvalidInput, match="encoding 'u9' is unknown"):
        KeepPolicy(encoding="u9")
    with pytest.raises(InvalidInput, match="encoding 'archive' is for corpora"):
        KeepPolicy(encoding="archive")
    with pytest.raises(InvalidInput, match="quota is -5 bytes"):
        KeepPolicy(quota_bytes=-5)


async def test_more_than_the_top_k_comes_from_a_corpus_that_has_exactly_it_or_from_the_teacher_behind(
    tmp_path: Path,
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher, writer = teacher_for(corpus), teacher_for(corpus)
    held = Fields(k=8, draws=5, seed=3, entropy=True)
    await fill(writer, cache.plan_targets("fake", "docs", writer.identity, fields=held), FillPlan())
    async with CachedTeacher.open(teacher, name="fake", cache=cache, policy=POLICY) as cached:
        for want in (held, Fields(k=4, entropy=True), Fields(k=0, draws=5, seed=3)):
            (answer,) = await cached.score([corpus.row(4)], want)
            (stored,) = cache.targets("fake", "docs").read_rows([4], fields=want)
            assert_same(answer, stored)
            assert (answer.entropy is None, answer.draws is None) == (not want.entropy, not want.draws)
        assert teacher.scored == []
        for want in (Fields(k=8, draws=5, seed=4), Fields(k=8, temperatures=(2.0,)), Fields(k=16, entropy=True)):
            answers = await cached.score([row(1, 2), corpus.row(4)], want)
            exact = await writer.score([row(1, 2), corpus.row(4)], want)
            for a, b in zip(answers, exact, strict=True):
                assert_same(a, b)
        assert len(teacher.scored) == 6, "not kept: asked for again, scored again"
        mixed = await cached.score([row(7, 7), corpus.row(4)], held)
        assert [targets.num_positions for targets in mixed] == [2, len(corpus.row(4))]
        assert len(teacher.scored) == 7


async def test_a_field_that_is_added_to_a_corpus_later_is_found(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher, writer = teacher_for(corpus), teacher_for(corpus)
    await fill(writer, cache.plan_targets("fake", "docs", writer.identity, fields=Fields(k=8)), FillPlan())
    want = Fields(k=8, entropy=True)
    async with CachedTeacher.open(teacher, name="fake", cache=cache, policy=POLICY) as cached:
        await cached.score([corpus.row(1)], want)
        assert len(teacher.scored) == 1
        await fill(writer, cache.plan_targets("fake", "docs", writer.identity, fields=want), FillPlan())
        cached._known.look_again()
        await cached.score([corpus.row(1)], want)
        assert len(teacher.scored) == 1


async def test_a_top_k_that_is_added_to_other_fields_later_is_found(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher, writer = teacher_for(corpus), teacher_for(corpus)
    entropy = Fields(k=0, entropy=True)
    await fill(writer, cache.plan_targets("fake", "docs", writer.identity, fields=entropy), FillPlan())
    async with CachedTeacher.open(teacher, name="fake", cache=cache, policy=POLICY) as cached:
        await cached.score([corpus.row(1)], entropy)
        await fill(writer, cache.plan_targets("fake", "docs", writer.identity, fields=Fields(k=8)), FillPlan())
        cached._known.look_again()
        await cached.score([corpus.row(1)], Fields(k=8))
        assert teacher.scored == []


async def test_a_damaged_row_of_a_corpus_is_scored_again_and_its_neighbours_are_not(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", row_tokens=2048, shard_positions=1 << 20, texts=["word " * 2000])
    writer = teacher_for(corpus)
    await fill(writer, plan_targets(cache, writer), FillPlan())
    path = next(Path(cache.root.url, "targets").rglob("gaps/c/0/0"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    teacher = teacher_for(corpus)
    async with CachedTeacher.open(teacher, name="fake", cache=cache, policy=POLICY) as cached:
        rows = corpus.rows(0, len(corpus))
        assert len(rows) > 2
        await cached.score(rows, WANT)
        assert teacher.scored == [rows[0].tobytes()]
        assert "gaps" in cached.store_error


async def test_a_running_service_keeps_its_journal_within_the_quota(cache: Cache) -> None:
    policy = KeepPolicy(k=16, tidy_seconds=0.05, quota_bytes=40_000)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        for i in range(8):
            await cached.score([row(*range(i, i + 40))], WANT)
            await cached._flush()
        # Records come on top of the arrays.
        await eventually(lambda: sum(cache.root.sizes("journal").values()) <= 60_000)
        assert cached.store_error == ""
        (answer,) = await cached.score([row(*range(7, 47))], WANT)
        assert answer.num_positions == 40


async def test_storing_and_tidying_each_have_one_thread_however_many_calls_there_are(cache: Cache) -> None:
    """A thread's allocator keeps what a segment took: with more threads there is more of it."""

    def journal_threads() -> list[str]:
        names = sorted(thread.name for thread in threading.enumerate())
        return [name for name in names if name.startswith(("flush-smol", "tidy-smol"))]

    async def stored(segments: int) -> None:
        await eventually(lambda: len(journal_records(cache.root)) >= segments)

    policy = KeepPolicy(k=16, segment_positions=1, tidy_seconds=0.05)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        for segments in (1, 2):
            await asyncio.gather(*(cached.score([row(segments, 2, i)], WANT) for i in range(20)))
            await stored(segments)
        await eventually(lambda: journal_threads() == ["flush-smol_0", "tidy-smol_0"])
    assert journal_threads() == []
