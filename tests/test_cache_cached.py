from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cache import Cache, Fields, Targets
from cache.cached import CachedTeacher, KeepPolicy
from cache.commands import verify
from cache.errors import DeadlineExceeded, InvalidInput, LimitExceeded, Overloaded, PotstillError, TeacherFailed
from cache.fill import FillPlan, fill
from cache.types import Tokens
from tests.corpora import make_corpus, plan_targets, teacher_for
from tests.fakes import FakeTeacher, fake_identity

POLICY = KeepPolicy(k=16)
WANT = Fields(k=16)


def row(*ids: int) -> Tokens:
    return np.array(ids, dtype=np.uint32)


def same(a: Targets, b: Targets) -> bool:
    names = ("ids", "logprobs", "log_tail", "label_logprob")
    if not all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n != "ids") for n in names):
        return False
    others = [(getattr(a, n), getattr(b, n)) for n in ("entropy", "log_z", "dense")]
    others += [(getattr(a.draws, n, None), getattr(b.draws, n, None)) for n in ("offsets", "ids", "counts")]
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in others)


def verified(cache: Cache) -> int:
    """The exit status of `potstill verify`."""
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([cache.root.url]))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "c", mode="r+")


class Gated(FakeTeacher):
    """Answers only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self._asked = asyncio.Condition()

    async def asked(self, num_rows: int) -> None:
        """Wait until so many rows have come."""
        async with self._asked:
            await self._asked.wait_for(lambda: len(self.scored) >= num_rows)

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        answers = await super().score(rows, want)
        async with self._asked:
            self._asked.notify_all()
        await self.gate.wait()
        return answers


async def test_a_row_asked_for_twice_is_scored_once_and_answered_alike_also_after_a_restart(cache: Cache) -> None:
    teacher = FakeTeacher()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        (first,) = await cached.score([row(1, 2, 3)], WANT)
        (second,) = await cached.score([row(1, 2, 3)], WANT)
        assert (cached.counters.misses, cached.counters.hits) == (1, 1)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        (third,) = await cached.score([row(1, 2, 3)], WANT)
    assert len(teacher.scored) == 1
    assert same(first, second)
    assert same(first, third)
    exact = teacher.distribution(row(1, 2, 3), 16)
    assert np.array_equal(first.ids, exact.ids)
    assert np.abs(first.logprobs - exact.logprobs).max() <= 0.0635


async def test_callers_that_ask_at_the_same_time_share_one_score(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        asking = [asyncio.create_task(cached.score([row(1, 2), row(i)], WANT)) for i in range(10, 20)]
        await teacher.asked(11)
        teacher.gate.set()
        answers = await asyncio.gather(*asking)
    assert teacher.scored.count(row(1, 2).tobytes()) == 1
    assert all(same(answer[0], answers[0][0]) for answer in answers)
    assert cached.counters.joined == 9


class Refusing(Gated):
    """Refuses the first calls once the gate opens."""

    def __init__(self, error: PotstillError, times: int) -> None:
        super().__init__()
        self._error = error
        self._times = times

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        answers = await super().score(rows, want)
        self._times -= 1
        if self._times >= 0:
            raise self._error
        return answers


@pytest.mark.parametrize("refusal", [Overloaded("full"), DeadlineExceeded("late"), LimitExceeded("over the quota")])
async def test_who_joined_a_score_that_is_refused_is_scored_as_itself(cache: Cache, refusal: PotstillError) -> None:
    teacher = Refusing(refusal, 1)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        first = asyncio.create_task(cached.score([row(1)], WANT))
        await teacher.asked(1)
        joined = [asyncio.create_task(cached.score([row(1), row(2)], WANT)) for _ in range(3)]
        await teacher.asked(2)
        teacher.gate.set()
        with pytest.raises(type(refusal)):
            await first
        for answers in await asyncio.gather(*joined):
            assert same(answers[0], (await cached.score([row(1)], WANT))[0])
        assert teacher.scored.count(row(1).tobytes()) == 2, "those that joined share one score again"
        assert cached._in_flight == {}


async def test_who_joined_is_refused_when_it_is_refused_itself_and_when_the_teacher_fails(cache: Cache) -> None:
    for error, calls in ((Overloaded("full"), 3), (TeacherFailed("broken"), 1)):
        teacher = Refusing(error, 99)
        async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
            first = asyncio.create_task(cached.score([row(1)], WANT))
            await teacher.asked(1)
            joined = asyncio.create_task(cached.score([row(1)], WANT))
            await asyncio.sleep(0.05)
            teacher.gate.set()
            for asked in (first, joined):
                with pytest.raises(type(error)):
                    await asked
            assert len(teacher.scored) <= calls


async def test_a_caller_that_leaves_does_not_fail_the_others(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        leaving = asyncio.create_task(cached.score([row(1)], WANT))
        await teacher.asked(1)
        staying = asyncio.create_task(cached.score([row(1)], WANT))
        await asyncio.sleep(0.05)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        teacher.gate.set()
        assert (await staying)[0].num_positions == 1
    assert len(teacher.scored) == 1


async def test_a_failed_score_fails_all_who_wait_and_is_tried_again_by_the_next(cache: Cache) -> None:
    class Failing(FakeTeacher):
        fail = True

        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            await asyncio.sleep(0.05)
            if self.fail:
                raise TeacherFailed("the engine died")
            return await super().score(rows, want)

    teacher = Failing()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        results = await asyncio.gather(*(cached.score([row(1)], WANT) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, TeacherFailed) for result in results)
        teacher.fail = False
        assert (await cached.score([row(1)], WANT))[0].k == 16


async def test_a_smaller_k_is_a_hit_and_a_larger_one_is_scored_again_without_changing_the_first(
    cache: Cache,
) -> None:
    teacher = FakeTeacher()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        (small,) = await cached.score([row(5, 6)], Fields(k=4))
        (kept,) = await cached.score([row(5, 6)], WANT)
        assert same(kept.prefix(4), small)
        assert len(teacher.scored) == 1
        (large,) = await cached.score([row(5, 6)], Fields(k=32))
        assert large.k == 32
        assert len(teacher.scored) == 2
        assert same((await cached.score([row(5, 6)], WANT))[0], kept)


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
        assert all(same(a, b) for a, b in zip(answers, stored, strict=True))


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
        for _ in range(100):
            if list(Path(cache.root.url).rglob("smol-*.json")):
                break
            await asyncio.sleep(0.05)
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
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


async def test_a_row_asked_for_with_two_k_at_once_keeps_its_answers(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        wide = asyncio.create_task(cached.score([row(1, 2)], Fields(k=40)))
        await teacher.asked(1)
        narrow = asyncio.create_task(cached.score([row(1, 2)], Fields(k=20)))
        await asyncio.sleep(0.05)
        teacher.gate.set()
        (first,), (joined,) = await narrow, await wide
        assert same(joined.prefix(20), first)
        assert len(teacher.scored) == 1
        await cached.score([row(1, 2)], Fields(k=50))
        assert same((await cached.score([row(1, 2)], Fields(k=20)))[0], first)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        assert same((await cached.score([row(1, 2)], Fields(k=20)))[0], first)
    assert len(teacher.scored) == 2


async def test_work_that_nobody_waits_for_any_more_is_dropped(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        leaving = [asyncio.create_task(cached.score([row(1)], WANT)) for _ in range(2)]
        await teacher.asked(1)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert cached._in_flight == {}
        teacher.gate.set()
        assert (await cached.score([row(1)], WANT))[0].num_positions == 1
    assert len(teacher.scored) == 2


async def test_callers_that_come_while_a_score_ends_never_cause_a_second_one(cache: Cache) -> None:
    teacher = FakeTeacher()

    async def ask(number: int, seconds: float) -> Targets:
        await asyncio.sleep(seconds)
        return (await cached.score([row(number, number)], WANT))[0]

    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        for number in range(60):
            answers = await asyncio.gather(*(ask(number, i * 0.0004) for i in range(8)))
            assert all(same(answer, answers[0]) for answer in answers)
    assert len(teacher.scored) == 60


async def test_a_caller_that_comes_as_the_last_one_leaves_gets_a_score_of_its_own(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        leaving = asyncio.create_task(cached.score([row(1)], WANT))
        await teacher.asked(1)
        ((key, (batch,)),) = cached._in_flight.items()
        leaving.cancel()
        while not batch.dropped:  # noqa: ASYNC110 -- turns of the loop, not time
            await asyncio.sleep(0)
        assert cached._in_flight == {key: [batch]}, "on its way out, and not out yet"
        joining, _ = cached._join_or_score({key: row(1)}, WANT)
        assert not any(batch.dropped for batch in joining.values())
        teacher.gate.set()
        await cached._wait_for(joining)


async def test_a_bug_in_a_teacher_is_not_told_as_something_to_try_again(cache: Cache) -> None:
    class Buggy(FakeTeacher):
        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            await asyncio.sleep(0)
            raise ZeroDivisionError

    async with CachedTeacher.open(Buggy(), name="smol", cache=cache, policy=POLICY) as cached:
        with pytest.raises(TeacherFailed, match="ended without an answer"):
            await cached.score([row(1)], WANT)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the task reports the bug


async def test_a_store_that_takes_nothing_costs_neither_answers_nor_memory(cache: Cache) -> None:
    policy = KeepPolicy(k=16, segment_seconds=0.05)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        blocker = Path(cache.root.url) / "journal"
        blocker.write_text("not a folder")
        for i in range(5):
            await cached.score([row(i)], WANT)
        for _ in range(100):
            if cached.store_error:
                break
            await asyncio.sleep(0.05)
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
            assert same(answer, stored)
            assert (answer.entropy is None, answer.draws is None) == (not want.entropy, not want.draws)
        assert teacher.scored == []
        for want in (Fields(k=8, draws=5, seed=4), Fields(k=8, temperatures=(2.0,)), Fields(k=16, entropy=True)):
            answers = await cached.score([row(1, 2), corpus.row(4)], want)
            exact = await writer.score([row(1, 2), corpus.row(4)], want)
            assert all(same(a, b) for a, b in zip(answers, exact, strict=True))
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


async def test_a_quota_of_nothing_still_answers_and_scores_once_for_those_who_wait_together(cache: Cache) -> None:
    teacher = FakeTeacher()
    policy = KeepPolicy(k=16, quota_bytes=0)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=policy) as cached:
        await asyncio.gather(*(cached.score([row(1, 2)], WANT) for _ in range(3)))
        assert len(teacher.scored) == 1
        await cached.score([row(1, 2)], WANT)
        assert len(teacher.scored) == 2
    assert cache.root.sizes("journal") == {}


async def test_a_running_service_keeps_its_journal_within_the_quota(cache: Cache) -> None:
    policy = KeepPolicy(k=16, tidy_seconds=0.05, quota_bytes=40_000)
    async with CachedTeacher.open(FakeTeacher(), name="smol", cache=cache, policy=policy) as cached:
        for i in range(8):
            await cached.score([row(*range(i, i + 40))], WANT)
            await cached._flush()
        for _ in range(200):
            await asyncio.sleep(0.05)
            if sum(cache.root.sizes("journal").values()) <= 60_000:
                break
        assert sum(cache.root.sizes("journal").values()) <= 60_000, "records come on top of the arrays"
        assert cached.store_error == ""
        (answer,) = await cached.score([row(*range(7, 47))], WANT)
        assert answer.num_positions == 40
