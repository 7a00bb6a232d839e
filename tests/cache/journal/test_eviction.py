"""The quota of a journal: what goes first, and what stays whatever the quota is."""

from __future__ import annotations

from dataclasses import replace

from potstill.cache.journal.journal import Journal
from potstill.cache.journal.segment import SegmentRecord, journal_records
from potstill.cache.store.root import Root
from potstill.cache.upkeep.garbage import find_garbage
from tests.cache.journal.journals import (
    POLICY,
    expected,
    found,
    journal,
    kept,
    numbered,
    row,
    same,
    segments,
    store,
)
from tests.support.fakes import FakeTeacher, fake_identity


def test_over_the_quota_the_oldest_segments_go_whoever_wrote_them(root: Root) -> None:
    first, second = journal(root), journal(root)
    for i in range(4):
        store(first, [numbered(2 * i, 40)])
        store(second, [numbered(2 * i + 1, 40)])
    sizes = [SegmentRecord.read(root, path) for path in journal_records(root)]
    quota = int(max(s.num_bytes for s in sizes if s is not None) * 3.5)
    keeper = journal(root, replace(POLICY, quota_bytes=quota))
    keeper.tidy()
    held = [SegmentRecord.read(root, path) for path in journal_records(root)]
    assert sum(s.num_bytes for s in held if s is not None) <= quota
    rows = [numbered(i, 40) for i in range(8)]
    for each in (first, second, keeper):
        answers = found(each, rows)
        assert answers[:5] == [None] * 5
        assert all(same(a, expected(tokens)) for a, tokens in zip(answers[5:], rows[5:], strict=True))
    assert find_garbage(root, min_age_seconds=0.0) == []


def test_fresh_rows_are_evicted_last_also_by_a_host_whose_clock_is_a_year_behind(root: Root) -> None:
    """The others' clock, as far as this host can see: their records are of next year."""
    others = journal(root)
    for number in range(3):
        store(others, [numbered(number, 40)])
    for path in journal_records(root):
        record = SegmentRecord.read(root, path)
        assert record is not None
        root.remove(f"{path}.json")
        root.create(f"{path}.json", replace(record, sealed=record.sealed + 365 * 86_400).to_bytes())
        quota = int(record.num_bytes * 2.5)
    behind = journal(root, replace(POLICY, quota_bytes=quota))
    for number in range(3, 5):
        store(behind, [numbered(number, 40)])
        behind.tidy()
    answers = found(behind, [numbered(number, 40) for number in range(5)])
    assert [answer is not None for answer in answers] == [False, False, False, True, True]


def test_a_quota_of_nothing_keeps_nothing_and_removes_nothing(root: Root) -> None:
    store(journal(root), [row(1)])
    empty = journal(root, replace(POLICY, quota_bytes=0))
    store(empty, [row(2)])
    empty.tidy()
    assert [answer is not None for answer in found(empty, [row(1), row(2)])] == [True, False]
    assert segments(root) == 1


def test_a_quota_evicts_what_its_own_identity_keeps_and_nothing_of_another(root: Root) -> None:
    """Two services of one teacher's name: the second has another model, and a quota that all of it is over."""
    store(journal(root), [row(1)])
    other = FakeTeacher(fake_identity(model="retrained"))
    retrained = Journal(root, "smol", other.identity, replace(POLICY, quota_bytes=1))
    assert found(retrained, [row(1)]) == [None]
    retrained.add([kept(row(1), teacher=other)])
    retrained.flush(other.provenance)
    assert segments(root) == 2
    retrained.tidy()
    assert found(retrained, [row(1)]) == [None]
    assert same(found(journal(root), [row(1)])[0], expected(row(1)))
