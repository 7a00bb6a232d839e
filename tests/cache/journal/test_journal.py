from __future__ import annotations

import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache
from potstill.cache.corpus.keys import row_key
from potstill.cache.encoding.logprobs import RankTable, encoding_by_name
from potstill.cache.errors import InvalidInput, PotstillError
from potstill.cache.journal.index import JournalIndex
from potstill.cache.journal.journal import Journal, JournalPolicy
from potstill.cache.journal.merge import MANY, choose
from potstill.cache.journal.segment import JournalRow, SegmentRecord, corrupt_journal_objects, journal_records
from potstill.cache.store.root import Root
from potstill.cache.types import Tokens
from potstill.cache.upkeep.garbage import find_garbage
from tests.cache.journal.journals import (
    POLICY,
    RANKS,
    TEACHER,
    K,
    expected,
    found,
    journal,
    kept,
    key_of,
    numbered,
    row,
    same,
    segments,
    store,
)
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.paths import GOLDEN
from tests.support.processes.s3 import s3_server


@pytest.mark.parametrize(
    "encoding", ["u8", pytest.param("f16", marks=pytest.mark.slow), pytest.param("f32", marks=pytest.mark.slow)]
)
def test_many_small_segments_become_one_and_every_answer_keeps_its_bits(root: Root, encoding: str) -> None:
    policy = replace(POLICY, encoding=encoding)
    writer, reader = journal(root, policy), journal(root, policy)
    rows = [numbered(i, 3 + i % 40) for i in range(34)]
    for i in range(0, 34, 2):
        store(writer, rows[i : i + 2], encoding=encoding)
    assert found(reader, rows) == [None] * 34, "another process' new segments are seen at the next look"
    reader.tidy()
    assert segments(root) == 1
    for each in (writer, reader, journal(root, policy)):
        answers = found(each, rows)
        assert all(same(a, expected(tokens, encoding=encoding)) for a, tokens in zip(answers, rows, strict=True))
    assert find_garbage(root, min_age_seconds=0.0) == []
    (path,) = journal_records(root)
    assert corrupt_journal_objects(root, path) == []
    record = SegmentRecord.read(root, path)
    assert record is not None
    assert (record.num_rows, record.num_positions) == (34, sum(map(len, rows)))
    assert 0 <= record.error["mean_abs"] <= record.error["max_abs"] <= encoding_by_name(encoding).max_abs_error


def test_few_segments_and_those_of_another_k_stay_as_they_are(root: Root) -> None:
    writer = journal(root)
    for i in range(MANY):
        store(writer, [numbered(i)])
    store(writer, [numbered(99)], k=12)
    writer.tidy()
    assert segments(root) == MANY + 1
    store(writer, [numbered(98)])
    writer.tidy()
    assert segments(root) == 2
    assert all(a is not None for a in found(writer, [numbered(i) for i in (*range(MANY), 98, 99)]))


def test_joining_holds_one_block_of_one_array_however_many_there_are(root: Root) -> None:
    writer = journal(root)
    one = kept(numbered(1, 64))
    repeated = {name: np.concatenate([part] * 256) for name, part in one.stored.items()}
    tokens = np.concatenate([one.tokens] * 256)
    for i in range(MANY + 1):
        writer.add([replace(one, key=i.to_bytes(16, "big"), tokens=tokens, stored=repeated)])
        writer.flush(TEACHER.provenance)
    block_bytes = (1 << 18) * K * repeated["ids"].itemsize
    assert (MANY + 1) * repeated["ids"].nbytes > block_bytes
    tracemalloc.start()
    try:
        writer.tidy()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert segments(root) == 1
    assert most < 2 * block_bytes


def test_joined_segments_are_not_joined_again_with_every_new_one(root: Root) -> None:
    """Sizes are made up: what is chosen depends on records alone."""
    writer = journal(root)
    for i in range(MANY + 1):
        store(writer, [numbered(i)])
    index = JournalIndex(root, "smol", TEACHER.identity, RANKS, lambda _: None)
    index.refresh()
    small = index.segments()
    assert choose(small, 1 << 40) == small
    assert choose(small, sum(s.record.num_bytes for s in small[:5])) == small[:5], "as many as fit"
    small[0].record = replace(small[0].record, num_positions=1 << 16)
    assert choose(small, 1 << 40) == [], "one is larger than all others"
    small[0].record = replace(small[0].record, num_positions=1 << 23)
    assert choose(small, 1 << 40) == [], "only 16 are small enough"
    for segment in small:
        segment.record = replace(segment.record, num_positions=1 << 21)
    assert choose(small, 1 << 40) == small[:4], "8M positions are the most"


def test_of_two_processes_scores_of_a_row_the_first_sealed_answers_before_and_after_joining(root: Root) -> None:
    shared, first, second = row(1, 2, 3), journal(root), journal(root)
    other = FakeTeacher(fake_identity(model="noise"))
    noisy = replace_logprobs(shared)
    for each, rows in ((first, [kept(shared)]), (second, [noisy])):
        each.add(rows)
        each.flush(other.provenance)
    third = journal(root)
    assert same(found(third, [shared])[0], expected(shared))
    for i in range(MANY):
        store(second, [numbered(i)])
    third.tidy()
    assert segments(root) == 1
    assert same(found(third, [shared])[0], expected(shared))
    record = SegmentRecord.read(root, journal_records(root)[0])
    assert record is not None
    assert record.num_rows == MANY + 1, "each row once"


def replace_logprobs(tokens: Tokens) -> JournalRow:
    """Score a row again by a process whose floats come out differently."""
    exact = TEACHER.distribution(tokens, K)
    logprobs = exact.logprobs - np.float32(0.5)
    tail = np.log1p(-np.exp(logprobs.astype(np.float64)).sum(axis=1)).astype(np.float32)
    changed = replace(exact, logprobs=logprobs, log_tail=tail)
    return JournalRow.of(key_of(tokens), tokens, changed, encoding_by_name("u8"), RANKS)[0]


def test_waiting_rows_and_stored_ones_answer_alike_and_the_fewest_entries_first(root: Root) -> None:
    writer = journal(root)
    writer.add([kept(row(1, 2), k=8), kept(row(1, 2), k=20), kept(row(3), k=20)])
    before = [found(writer, [row(1, 2), row(3)], k=k) for k in (4, 8, 9, 20, 21)]
    assert writer.flush(TEACHER.provenance) == 3
    after = [found(writer, [row(1, 2), row(3)], k=k) for k in (4, 8, 9, 20, 21)]
    assert [[None if a is None else a.k for a in answers] for answers in before] == [
        [8, 20],
        [8, 20],
        [20, 20],
        [20, 20],
        [None, None],
    ]
    for one, other in zip(before, after, strict=True):
        assert all(a is b is None or (b is not None and same(a, b)) for a, b in zip(one, other, strict=True))
    assert writer.flush(TEACHER.provenance) == 0


def test_a_damaged_row_is_lost_alone_and_named(root: Root) -> None:
    rows = [numbered(i, 3000) for i in range(3)]
    store(journal(root), rows)
    (path,) = journal_records(root)
    gaps = Path(root.url, path, "gaps/c/0/0")
    data = bytearray(gaps.read_bytes())
    data[100] ^= 1  # in the first chunk of 2048 positions
    gaps.write_bytes(data)
    reader = journal(root)
    answers = found(reader, rows)
    assert answers[0] is None
    assert all(same(a, expected(tokens)) for a, tokens in zip(answers[1:], rows[1:], strict=True))
    assert [path in line for line in reader.index.skipped] == [True]
    assert found(reader, rows)[0] is None
    assert len(reader.index.skipped) == 1, "named once"


def test_a_record_under_another_segments_name_is_refused(root: Root) -> None:
    for i in range(2):
        store(journal(root), [numbered(i)])
    one, other = (Path(root.url, f"{path}.json") for path in journal_records(root))
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)
    reader = journal(root)
    assert found(reader, [numbered(0), numbered(1)]) == [None, None]
    assert len(reader.index.skipped) == 2
    assert "is the record of journal/" in reader.index.skipped[0]
    assert all(corrupt_journal_objects(root, path) for path in journal_records(root))


def test_a_journal_of_format_1_answers_and_is_joined_with_new_segments(tmp_path: Path) -> None:
    from tests.golden.make import JOURNAL_ROW

    shutil.copytree(GOLDEN / "format-1", tmp_path / "c")
    cache = Cache.open(tmp_path / "c", mode="r+")
    teacher = FakeTeacher(cache.targets("u8", "docs").identity)
    ranks = RankTable.plain(teacher.identity.vocab_size)

    def key(tokens: Tokens) -> bytes:
        return row_key(teacher.identity.tokenizer_sha256, tokens)

    old = Journal(cache.root, "asked", teacher.identity, POLICY)
    reader = Journal(cache.root, "asked", teacher.identity, POLICY)
    (answer,) = reader.find([key(JOURNAL_ROW)], 8)
    assert answer is not None
    for i in range(MANY):
        exact = teacher.distribution(numbered(i), 8)
        old.add([JournalRow.of(key(numbered(i)), numbered(i), exact, encoding_by_name("u8"), ranks)[0]])
        old.flush(teacher.provenance)
    old.tidy()
    assert len(journal_records(cache.root, "asked")) == 1
    for each in (old, reader):
        assert same(each.find([key(JOURNAL_ROW)], 8)[0], answer)


def test_a_segment_of_format_1_that_is_removed_under_a_reader_is_a_miss_and_never_zeros(tmp_path: Path) -> None:
    from tests.golden.make import JOURNAL_ROW

    shutil.copytree(GOLDEN / "format-1", tmp_path / "c")
    cache = Cache.open(tmp_path / "c", mode="r+")
    identity = cache.targets("u8", "docs").identity
    keys = [row_key(identity.tokenizer_sha256, tokens) for tokens in (JOURNAL_ROW, row(9))]
    index = JournalIndex(cache.root, "asked", identity, RankTable.plain(identity.vocab_size), lambda _: None)
    index.refresh()
    (segment,) = index.segments()
    assert segment.locate(keys) == [0, None]
    segment.row_ranges([0])  # all metadata is read by now, and no targets
    path = Path(cache.root.url, segment.record.path)
    path.with_name(f"{path.name}.json").unlink()
    for name in ("gaps", "log_tail"):
        shutil.rmtree(path / name / "c")
    assert index.find(keys, 8, [None, None]) == {}
    assert index.losses == 1
    assert index.skipped == []


def test_a_stopped_join_leaves_the_segments_as_they_were(root: Root) -> None:
    writer = journal(root)
    for i in range(MANY + 1):
        store(writer, [numbered(i)])
    writer.close()
    writer.tidy()
    assert segments(root) == MANY + 1
    assert find_garbage(root, min_age_seconds=0.0) == []


@pytest.mark.parametrize("turns", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_processes_that_keep_join_and_evict_at_once_never_answer_wrong_or_fail(root: Root, turns: int) -> None:
    policy = replace(POLICY, quota_bytes=100_000)
    problems: list[PotstillError] = []
    done = threading.Event()

    def work(number: int) -> None:
        own = Journal(root, "smol", TEACHER.identity, policy, problems.append)
        for turn in range(turns):
            store(own, [numbered(16 * turn + number + 4 * i, 12) for i in range(3)])
            if turn % 3 == 0:
                own.tidy()

    def read() -> int:
        own = Journal(root, "smol", TEACHER.identity, policy, problems.append)
        hits, numbers = 0, np.random.default_rng(0)
        while not done.is_set():
            rows = [numbered(int(i), 12) for i in numbers.integers(0, 17 * turns, 20)]
            for tokens, answer in zip(rows, found(own, rows), strict=True):
                assert answer is None or same(answer, expected(tokens))
                hits += answer is not None
            if numbers.random() < 0.1:
                own.tidy()
        assert own.index.skipped == []
        return hits

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for writer in [pool.submit(work, number) for number in range(3)]:
                writer.result()
        finally:
            done.set()
        assert sum(reader.result() for reader in readers) > 0
    assert problems == []
    journal(root, policy).tidy()
    held = [SegmentRecord.read(root, path) for path in journal_records(root)]
    assert sum(record.num_bytes for record in held if record is not None) <= policy.quota_bytes
    assert find_garbage(root, min_age_seconds=0.0) == []


def test_an_object_store_keeps_joins_and_evicts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        root = Root.open(server.new_bucket(), create=True)
        writer, reader = journal(root), journal(root)
        rows = [numbered(i) for i in range(MANY + 1)]
        for tokens in rows:
            store(writer, [tokens])
        reader.tidy()
        assert segments(root) == 1
        for each in (writer, reader):
            assert all(same(a, expected(tokens)) for a, tokens in zip(found(each, rows), rows, strict=True))
        journal(root, replace(POLICY, quota_bytes=1)).tidy()
        assert found(writer, rows[:2]) == [None, None]
        assert root.sizes("journal") == {}


def test_policies_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(InvalidInput, match="encoding 'archive' is for corpora; a journal keeps rows as 'u8'"):
        JournalPolicy(encoding="archive")
    with pytest.raises(InvalidInput, match="quota is -1 bytes; it must be at least 0"):
        JournalPolicy(quota_bytes=-1)
