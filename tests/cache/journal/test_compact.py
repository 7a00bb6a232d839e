from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.commands import compact as command, verify
from potstill.cache.corpus.keys import row_key
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.encoding.logprobs import RankTable, encoding_by_name
from potstill.cache.errors import InvalidInput, NotFound, SpecMismatch, StoreError
from potstill.cache.journal.compact import CompactPlan, compact
from potstill.cache.journal.journal import Journal, JournalPolicy
from potstill.cache.journal.segment import JournalRow, SegmentRecord, journal_records
from potstill.cache.lineage import Handed
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.store.root import Root
from potstill.cache.targets.commit import Commit
from potstill.cache.targets.segment_set import SegmentSet
from potstill.cache.types import Tokens
from potstill.cache.upkeep.garbage import find_garbage
from potstill.cache.upkeep.inspection import inspect_cache
from tests.support.corpora import VOCAB, byte_tokenizer, make_corpus, topics
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.paths import GOLDEN

K = 16
TOKENIZER = byte_tokenizer()
IDENTITY = fake_identity(vocab_size=VOCAB, tokenizer_sha256=fingerprint(TOKENIZER))
PLAN = CompactPlan(teacher="smol", corpus="asked", tokenizer=TOKENIZER, shard_positions=2000)


def texts(count: int) -> list[Tokens]:
    """Real text of different lengths."""
    found = (TOKENIZER.encode(text).ids for text in topics(count, characters=700))
    return [np.array(ids[: 40 + 13 * i % 600], dtype=np.uint32) for i, ids in enumerate(found)]


ROWS = texts(24)


def same(a: Targets, b: Targets) -> bool:
    names = ("ids", "logprobs", "log_tail", "label_logprob")
    return all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n != "ids") for n in names)


def verified(cache: Cache) -> int:
    """The exit status of `potstill verify`."""
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([cache.root.url]))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "c", mode="r+")


async def ask(cache: Cache, rows: list[Tokens], *, k: int = K, encoding: str = "u8") -> list[Targets]:
    """By a service of its own, which keeps what it answers."""
    policy = KeepPolicy(k=k, encoding=encoding)
    async with CachedTeacher.open(FakeTeacher(IDENTITY), name="smol", cache=cache, policy=policy) as cached:
        return await cached.score(rows, Fields(k=k))


async def ask_silent(cache: Cache, rows: list[Tokens], *, k: int = K) -> list[Targets]:
    """Without a score: everything is kept."""
    teacher = FakeTeacher(IDENTITY)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=KeepPolicy(k=k)) as cached:
        answers = await cached.score(rows, Fields(k=k))
    assert teacher.scored == []
    return answers


@pytest.mark.parametrize("encoding", ["u8", "f16", "f32"])
async def test_what_several_services_kept_becomes_a_corpus_and_answers_keep_their_bits(
    cache: Cache, encoding: str
) -> None:
    first = await ask(cache, ROWS[:14], encoding=encoding)
    second = await ask(cache, ROWS[10:], encoding=encoding)
    report = compact(cache, PLAN)
    assert (report.corpus_made, report.k, report.encoding, report.segments_left) == (True, K, encoding, 0)
    assert report.segments_removed == 2
    assert report.shards_written == report.corpus.num_shards > 2
    assert cache.root.sizes("journal") == {}
    corpus = cache.corpus("asked")
    assert sorted(tokens.tobytes() for tokens in corpus.rows(0, len(corpus))) == sorted(r.tobytes() for r in ROWS)
    assert corpus.spec.duplicate_rows == 0
    answers = await ask_silent(cache, ROWS)
    assert all(same(a, b) for a, b in zip(answers, [*first, *second[4:]], strict=True))
    targets = cache.targets("smol", "asked")
    assert (targets.fields, targets.encoding.name) == (Fields(k=K), encoding)
    assert targets.committed.all()
    (commit, *_) = targets.sets[0].commits.all()
    assert 0 <= commit.error["max_abs"] <= targets.encoding.max_abs_error
    assert commit.provenance.whole_path == "fake, journal"
    assert Handed.after(commit.provenance.steps).words == "the teacher"
    assert verified(cache) == 0
    assert find_garbage(cache.root, min_age_seconds=0.0) == []


async def test_a_running_service_answers_through_it_without_a_score(cache: Cache) -> None:
    teacher = FakeTeacher(IDENTITY)
    policy = KeepPolicy(k=K, tidy_seconds=0.05)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=policy) as cached:
        first = await cached.score(ROWS, Fields(k=K))
        await cached._flush()
        teacher.scored.clear()
        compacting = asyncio.create_task(asyncio.to_thread(compact, cache, PLAN))
        rounds = 0
        while not compacting.done() or rounds < 3:
            answers = await cached.score(ROWS, Fields(k=K))
            assert all(same(a, b) for a, b in zip(answers, first, strict=True))
            rounds += 1
        assert (await compacting).segments_left == 0
        answers = await cached.score(ROWS, Fields(k=K))
        assert all(same(a, b) for a, b in zip(answers, first, strict=True))
        assert teacher.scored == []
        assert cached.store_error == ""
    assert cache.root.sizes("journal") == {}


async def test_rows_with_fewer_entries_stay_and_those_with_more_come_along_and_stay_too(cache: Cache) -> None:
    await ask(cache, ROWS[:4], k=8)
    exact = await ask(cache, ROWS[2:8])
    wide = await ask(cache, ROWS[6:12], k=32)
    with pytest.raises(InvalidInput, match="with 8, 16, 32 entries; choose with --top-k"):
        compact(cache, PLAN)
    report = compact(cache, CompactPlan(teacher="smol", corpus="asked", k=K, tokenizer=TOKENIZER))
    assert len(report.corpus) == 10
    assert (report.segments_removed, report.segments_left) == (1, 2)
    answers = await ask_silent(cache, ROWS[2:8])
    assert all(same(a, b) for a, b in zip(answers, exact, strict=True)), "of two the one with K entries is copied"
    answers = await ask_silent(cache, ROWS[6:12], k=32)
    assert all(same(a, b) for a, b in zip(answers, wide, strict=True))
    stored = cache.targets("smol", "asked").read_rows(range(6, 10))
    for tokens, targets in zip(ROWS[8:12], stored, strict=True):
        distribution = FakeTeacher(IDENTITY).distribution(tokens, K)
        assert np.array_equal(targets.ids, distribution.ids)
        assert np.abs(targets.logprobs - distribution.logprobs).max() <= 2 * 0.0635


async def test_rows_of_another_encoding_are_encoded_again_into_the_one_of_most_rows(cache: Cache) -> None:
    most = await ask(cache, ROWS[4:])
    await ask(cache, ROWS[:4], encoding="f32")
    report = compact(cache, PLAN)
    assert (report.encoding, report.segments_left) == ("u8", 0)
    answers = await ask_silent(cache, ROWS)
    assert all(same(a, b) for a, b in zip(answers[4:], most, strict=True))
    for tokens, targets in zip(ROWS[:4], answers[:4], strict=True):
        distribution = FakeTeacher(IDENTITY).distribution(tokens, K)
        assert np.abs(targets.logprobs - distribution.logprobs).max() <= 0.0635


def worst(found: list[Targets], other: list[Targets]) -> float:
    """The largest difference of a logprob."""
    return max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(found, other, strict=True))


def only_commit(cache: Cache) -> Commit:
    (commit,) = cache.targets("smol", "asked").sets[0].commits.all()
    return commit


@pytest.mark.parametrize(("k", "told"), [(16, "journal partly of u8"), (8, "journal of u8")])
async def test_figures_are_measured_and_say_where_that_was_against_the_journal(cache: Cache, k: int, told: str) -> None:
    wide = await ask(cache, ROWS[:1], k=32)
    copied = await ask(cache, ROWS[1:6], k=16)
    compact(cache, CompactPlan(teacher="smol", corpus="asked", k=k, tokenizer=TOKENIZER))
    commit, targets = only_commit(cache), cache.targets("smol", "asked")
    assert commit.provenance.whole_path == f"fake, {told} within 0.0635"
    place = {row.tobytes(): i for i, row in enumerate(targets.corpus.rows(0, 6))}
    stored = targets.read_rows([place[row.tobytes()] for row in ROWS[:6]])
    handed = [wide[0].prefix(k), *(each.prefix(k) for each in copied)]
    exact = [FakeTeacher(IDENTITY).distribution(row, k) for row in ROWS[:6]]
    # Cut rows were handed over by the journal, copied ones by the teacher.
    against = handed if k == 8 else [handed[0], *exact[1:]]
    assert commit.error["max_abs"] == pytest.approx(worst(stored, against), abs=1e-6)
    assert worst(stored, exact) <= worst(stored, handed) + targets.encoding.max_abs_error
    assert commit.error["mean_kl"] <= commit.error["p999_kl"] < 1e-3
    about = inspect_cache(cache).to_json["targets"]["smol"]["asked"]
    assert about["measured_error"]["max_abs"] <= about["encoding"]["max_abs_error"]
    assert [each["max_abs_error"] for each in about["measured_against"]] == [0.0635]
    assert verified(cache) == 0


async def test_rows_kept_exactly_and_encoded_for_the_corpus_are_measured_against_the_teacher(cache: Cache) -> None:
    await ask(cache, ROWS[:1], encoding="f32")
    await ask(cache, ROWS[1:6])
    compact(cache, PLAN)
    targets = cache.targets("smol", "asked")
    exact = [FakeTeacher(IDENTITY).distribution(row, K) for row in targets.corpus.rows(0, len(targets.corpus))]
    found = worst(targets.read_rows(range(len(exact))), exact)
    errors = [commit.error["max_abs"] for commit in targets.sets[0].commits.all()]
    assert max(errors) == pytest.approx(found, abs=1e-6)
    (against,) = inspect_cache(cache).to_json["targets"]["smol"]["asked"]["measured_against"]
    assert (against["what"], against["max_abs_error"]) == ("the teacher", 0.0)


async def test_a_journal_of_format_1_measured_nothing_and_its_rows_say_so(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-1", tmp_path / "c")
    cache = Cache.open(tmp_path / "c", mode="r+")
    compact(cache, CompactPlan(teacher="asked", corpus="asked"))
    (commit,) = cache.targets("asked", "asked").sets[0].commits.all()
    assert {commit.error[name] for name in ("max_abs", "mean_abs", "mean_kl", "p999_kl")} == {0.0}
    assert commit.provenance.whole_path.endswith(", journal of u8 within 0.0635")


async def test_the_journal_is_kept_when_told_so(cache: Cache) -> None:
    await ask(cache, ROWS[:5])
    report = compact(cache, CompactPlan(teacher="smol", corpus="asked", tokenizer=TOKENIZER, keep_journal=True))
    assert (report.segments_removed, report.segments_left) == (0, 1)
    again = compact(cache, CompactPlan(teacher="smol", corpus="asked", tokenizer=TOKENIZER))
    assert (again.corpus_made, again.shards_before, again.shards_written) == (False, 1, 0)
    assert (again.segments_removed, again.segments_left) == (1, 0)


class _Power:
    """Goes off at the n-th write of a record or removal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        for name in ("create", "remove"):
            monkeypatch.setattr(Root, name, self._counted(getattr(Root, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(root: Root, path: str, *args: Any, **kwargs: Any) -> Any:
            if not path.startswith("claims/"):
                self.left -= 1
                if self.left == 0:
                    raise StoreError(f"{path}: the power went off")
            return real(root, path, *args, **kwargs)

        return call


async def test_stopped_at_any_record_it_goes_on_and_no_answer_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Cache.open(tmp_path / "asked", mode="r+")
    rows = ROWS[:8]
    first = await ask(asked, rows[:4]) + await ask(asked, rows[4:])
    power = _Power(monkeypatch)
    stops = 0
    for moment in range(1, 40):
        shutil.copytree(tmp_path / "asked", tmp_path / str(moment))
        cache = Cache.open(tmp_path / str(moment), mode="r+")
        power.left = moment
        try:
            compact(cache, PLAN)
        except StoreError:
            stops += 1
            power.left = -1
            answers = await ask_silent(cache, rows)
            assert all(same(a, b) for a, b in zip(answers, first, strict=True))
            compact(cache, PLAN)
        else:
            break
        assert cache.root.sizes("journal") == {}
        answers = await ask_silent(cache, rows)
        assert all(same(a, b) for a, b in zip(answers, first, strict=True))
    assert stops >= 5, "the seal, the spec, the ranks, two shards, a manifest, two removals"


async def test_rows_that_come_in_meanwhile_stay_in_the_journal(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    await ask(cache, ROWS[:10])
    write = SegmentSet.write_encoded

    def write_late(self: SegmentSet, shard: int, *args: object, **kwargs: object) -> bool:
        if shard == 0:
            late = Journal(cache.root, "smol", IDENTITY, JournalPolicy())
            late.add([kept(ROWS[10])])
            late.flush(FakeTeacher(IDENTITY).provenance)
        return write(self, shard, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(SegmentSet, "write_encoded", write_late)
    report = compact(cache, PLAN)
    assert len(report.corpus) == 10
    assert (report.segments_removed, report.segments_left) == (1, 1)
    await ask_silent(cache, ROWS[:11])


def kept(tokens: Tokens) -> JournalRow:
    exact = FakeTeacher(IDENTITY).distribution(tokens, K)
    key = row_key(IDENTITY.tokenizer_sha256, tokens)
    return JournalRow.of(key, tokens, exact, encoding_by_name("u8"), RankTable.plain(VOCAB))[0]


async def test_it_goes_on_when_a_service_joins_the_segments_under_it(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = Journal(cache.root, "smol", IDENTITY, JournalPolicy())
    for tokens in ROWS[:18]:
        services.add([kept(tokens)])
        services.flush(FakeTeacher(IDENTITY).provenance)
    write = SegmentSet.write_encoded

    def join(self: SegmentSet, shard: int, *args: object, **kwargs: object) -> bool:
        # As a service would whose claim ran out of time.
        cache.root.delete("claims")
        Journal(cache.root, "smol", IDENTITY, JournalPolicy()).tidy()
        return write(self, shard, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(SegmentSet, "write_encoded", join)
    report = compact(cache, PLAN)
    assert (report.segments_removed, report.segments_left) == (1, 0)
    await ask_silent(cache, ROWS[:18])


async def test_what_cannot_be_compacted_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "c")
    with pytest.raises(NotFound, match="teacher 'smol' has no journal in .*; there are journals of: none"):
        compact(cache, PLAN)
    await ask(cache, ROWS[:3])
    before = cache.root.sizes("")
    with pytest.raises(NotFound, match="no row of teacher 'smol' with 17 entries; the most is 16: take --top-k 16"):
        compact(cache, CompactPlan(teacher="smol", corpus="asked", k=17, tokenizer=TOKENIZER))
    with pytest.raises(SpecMismatch, match="the journal does not keep its row 0 with 16 entries"):
        compact(cache, CompactPlan(teacher="smol", corpus="docs"))
    with pytest.raises(InvalidInput, match="opened to read"):
        compact(Cache.open(cache.root.url), PLAN)
    with pytest.raises(InvalidInput, match="--top-k is 0"):
        CompactPlan(teacher="smol", corpus="asked", k=0)
    other = byte_tokenizer()
    other.add_special_tokens(["<x>"])
    with pytest.raises(SpecMismatch, match="--tokenizer is"):
        compact(cache, CompactPlan(teacher="smol", corpus="asked", tokenizer=other))
    assert cache.root.sizes("") == before


async def test_the_tokenizer_comes_from_a_corpus_or_has_to_be_given(tmp_path: Path, cache: Cache) -> None:
    await ask(cache, ROWS[:3])
    with pytest.raises(InvalidInput, match="no corpus in .* has the tokenizer .*; give it with --tokenizer"):
        compact(cache, CompactPlan(teacher="smol", corpus="asked"))
    with_docs, _ = make_corpus(tmp_path / "d")
    await ask(with_docs, ROWS[:3])
    assert len(compact(with_docs, CompactPlan(teacher="smol", corpus="asked")).corpus) == 3


async def test_rows_the_tokenizer_does_not_have_and_empty_ones_stay(cache: Cache) -> None:
    identity = fake_identity(vocab_size=VOCAB + 8, tokenizer_sha256=fingerprint(TOKENIZER))
    rows = [ROWS[0], np.array([1, VOCAB + 3], dtype=np.uint32), np.empty(0, dtype=np.uint32)]
    teacher = FakeTeacher(identity)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=KeepPolicy(k=K)) as cached:
        await cached.score(rows, Fields(k=K))
    report = compact(cache, PLAN)
    assert (len(report.corpus), report.segments_left) == (1, 1)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=KeepPolicy(k=K)) as cached:
        await cached.score(rows, Fields(k=K))
        assert cached.counters.hits == 3


async def test_the_command_says_what_it_did(cache: Cache, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    await ask(cache, ROWS[:6])
    paths = journal_records(cache.root)
    record = SegmentRecord.read(cache.root, paths[0])
    assert record is not None
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = [str(cache.root.url), "--teacher", "smol", "--corpus", "asked", "--tokenizer", str(tmp_path)]
    assert command.run(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    assert "smol: corpus asked made, 6 rows" in printed
    assert f"top-16 as u8, 1 shard committed, 0 before; 1 journal segment of {record.num_bytes:,} bytes" in printed
    seal = json.loads(Path(cache.root.url, "corpora/asked/zarr.json").read_text())
    assert seal["attributes"]["potstill"]["sources"] == [
        {"name": "journal of smol", "sha256": "", "documents": 6},
    ]


async def test_a_set_that_keeps_more_than_the_journal_is_not_filled_from_it(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    await ask(cache, [corpus.row(row) for row in range(len(corpus))])
    want = Fields(k=K, entropy=True)
    targets = cache.plan_targets("smol", "docs", IDENTITY, fields=want, encoding="u8")
    first, last = (int(row) for row in corpus.shard_rows[:2])
    teacher = FakeTeacher(IDENTITY)
    scored = [teacher.targets(corpus.row(row), want) for row in range(first, last)]
    assert targets.write_shard(0, Targets.concat(scored), teacher.provenance)
    with pytest.raises(SpecMismatch, match="also keep fields that the journal does not; compact into another"):
        compact(cache, CompactPlan(teacher="smol", corpus="docs", tokenizer=TOKENIZER))
    assert int(Cache.open(cache.root.url).targets("smol", "docs").committed.sum()) == 1
    assert journal_records(cache.root)
