"""Writers that pause until `gc` takes their group for garbage: no record names what is gone, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.annotations import annotate, read_annotation
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.keys import row_key
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.errors import CorruptSegment, NotCommitted, StoreError
from potstill.cache.journal import Journal, JournalPolicy
from potstill.cache.journal.compact import CompactPlan, compact
from potstill.cache.journal.segment import JournalRow
from potstill.cache.store.publishing import TOMBSTONE
from potstill.cache.store.root import Root
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.garbage import find_garbage, remove_garbage
from potstill.cache.upkeep.integrity import check_cache
from tests.cache.journal.journals import kept, row
from tests.support.corpora import VOCAB, byte_tokenizer, make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher, fake_identity

WANT = Fields(k=16)


def nothing() -> None:
    pass


class Overtaken(Root):
    """A store on which something happens right before a record is created, and right after."""

    record = ""
    data = b""
    """Bytes of the record, once it is about to be created."""
    before: Callable[[], object] = staticmethod(nothing)
    after: Callable[[], object] = staticmethod(nothing)

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        if not path.endswith(self.record):
            return super().create(path, data, durable=durable)
        before, after, self.record, self.data = self.before, self.after, "none", data
        before()
        created = super().create(path, data, durable=durable)
        after()
        return created


class Collecting(Root):
    """A store on which something happens once `gc` has buried a group, or once it has looked at its record again."""

    buried: Callable[[], object] = staticmethod(nothing)
    looked: Callable[[], object] = staticmethod(nothing)

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        created = super().create(path, data, durable=durable)
        if path.endswith(TOMBSTONE):
            self.buried()
        return created

    def delete(self, prefix: str) -> None:
        self.looked()
        super().delete(prefix)


def collect(root: Root) -> list[str]:
    """As `gc` a day later: no group is too young."""
    found = find_garbage(root, min_age_seconds=0.0)
    return [item.path for item in found if "claims" not in item.path and remove_garbage(root, item)]


@dataclass(frozen=True, slots=True)
class Work:
    cache: Cache
    corpus: Corpus
    teacher: FakeTeacher

    def planned(self, root: Root) -> TargetSet:
        """As a process that has this root would."""
        cache = Cache(root, "r+", self.cache._reading)
        return cache.plan_targets("fake", "docs", self.teacher.identity, fields=WANT)

    def write(self, targets: TargetSet, shard: int) -> bool:
        first, last = (int(index) for index in self.corpus.shard_rows[shard : shard + 2])
        scored = Targets.concat([self.teacher.targets(row, WANT) for row in self.corpus.rows(first, last)])
        return targets.write_shard(shard, scored, self.teacher.provenance)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    work = Work(cache, corpus, teacher)
    assert work.write(plan_targets(cache, teacher, k=16), 0)
    return work


def sound(root: Root) -> bool:
    return not any(checked.problems for checked in check_cache(root))


def write_all(work: Work, root: Root) -> None:
    """Publish one of each kind under records that are not there yet."""
    work.write(work.planned(root), 1)
    if "even" not in work.corpus.annotations():
        annotate(root, work.corpus.annotated, "even", np.arange(len(work.corpus)) % 2 == 0, {})
    if "more" not in work.cache.fresh().corpora():
        ingest_rows(root, "more", [np.arange(1, 9, dtype=np.uint32)], byte_tokenizer(), IngestPlan(row_tokens=8))
    journal = Journal(root, "smol", FakeTeacher().identity, JournalPolicy())
    journal.add([kept(row(1, 2, 3))])
    journal.flush(FakeTeacher().provenance)


RECORDS = ["commits/000001.json", "annotations/even.json", "corpora/more/zarr.json", "smol-000000.json"]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_whose_group_was_taken_for_garbage_is_withdrawn(work: Work, record: str) -> None:
    root = Overtaken.open(work.cache.root.url)
    root.record, root.before = record, lambda: collect(work.cache.root)
    with pytest.raises(StoreError, match=f"removed before .*{record} was there, which was withdrawn; run it again"):
        write_all(work, root)
    assert sound(work.cache.root)
    assert not list(Path(work.cache.root.url).rglob(record))
    write_all(work, work.cache.root)
    assert sound(work.cache.root)
    assert work.planned(work.cache.root).committed[:2].all()
    assert read_annotation(work.cache.root, work.corpus.annotated, "even")[0]


def test_a_rank_table_that_was_taken_for_garbage_is_made_again(work: Work) -> None:
    work.cache.root.delete("targets")
    root = Overtaken.open(work.cache.root.url)
    root.record, root.before = "ranks.json", lambda: collect(work.cache.root)
    with pytest.raises(StoreError, match=r"ranks\.json was there, which was withdrawn"):
        work.write(work.planned(root), 0)
    assert work.write(work.planned(work.cache.root), 0)
    assert sound(work.cache.root)


def test_who_read_a_commit_that_was_withdrawn_is_told_that_there_is_none(work: Work) -> None:
    reader = Cache.open(work.cache.root.url).targets("fake", "docs")
    start, stop = (int(position) for position in work.corpus.shard_starts[1:3])
    root = Overtaken.open(work.cache.root.url)
    root.record, root.before = "commits/000001.json", lambda: collect(work.cache.root)
    root.after = lambda: reader.sets[0].commits.require(1)
    with pytest.raises(StoreError):
        work.write(work.planned(root), 1)
    with pytest.raises(NotCommitted):
        reader.read(start, stop)
    assert work.write(work.planned(work.cache.root), 1)
    assert reader.read(start, stop).num_positions == stop - start


def test_a_commit_that_was_folded_before_it_was_withdrawn_is_in_no_manifest(work: Work) -> None:
    last = work.corpus.num_shards - 1
    for shard in range(1, last):
        assert work.write(work.planned(work.cache.root), shard)
    root = Overtaken.open(work.cache.root.url)
    root.record, root.before = f"commits/{last:06d}.json", lambda: collect(work.cache.root)
    root.after = lambda: work.planned(work.cache.root).fold()
    with pytest.raises(StoreError):
        work.write(work.planned(root), last)
    assert work.planned(work.cache.root).committed.tolist() == [True] * last + [False]
    assert sound(work.cache.root)


@pytest.mark.parametrize("looked", [False, True])
def test_whoever_comes_first_a_commit_and_its_segment_stay_or_go_together(work: Work, looked: bool) -> None:
    """The commit comes between the tombstone and `gc`'s second look for it, and between that look and the removal."""
    commit = "targets/fake/docs/commits/000001.json"
    root, gc = Overtaken.open(work.cache.root.url), Collecting.open(work.cache.root.url)

    def committed() -> None:
        gc.buried = gc.looked = nothing
        assert work.cache.root.create(commit, root.data)

    root.record, root.before = commit, lambda: collect(gc)
    if looked:
        gc.looked = committed
        with pytest.raises(StoreError, match="which was withdrawn"):
            work.write(work.planned(root), 1)
    else:
        gc.buried = committed
        assert work.write(work.planned(root), 1)
    assert work.planned(work.cache.root).committed[1] == (not looked)
    assert sound(work.cache.root)
    assert not list(Path(work.cache.root.url).rglob(TOMBSTONE))


@pytest.mark.parametrize("damaged", ["targets/smol/asked/segments/*/gaps/c/0/0", "corpora/asked/data-*/tokens/c/0"])
def test_compact_empties_no_journal_when_what_it_made_is_broken(work: Work, damaged: str) -> None:
    tokenizer = byte_tokenizer()
    teacher = FakeTeacher(fake_identity(vocab_size=VOCAB, tokenizer_sha256=fingerprint(tokenizer)))
    journal = Journal(work.cache.root, "smol", teacher.identity, JournalPolicy())
    rows = work.corpus.rows(0, 3)
    keys = [row_key(teacher.identity.tokenizer_sha256, tokens) for tokens in rows]
    for key, tokens in zip(keys, rows, strict=True):
        exact = teacher.distribution(tokens, 8)
        journal.add([JournalRow.of(key, tokens, exact, journal.encoding, journal.ranks)[0]])
    journal.flush(teacher.provenance)
    plan = CompactPlan(teacher="smol", corpus="asked", tokenizer=tokenizer)
    compact(work.cache, replace(plan, keep_journal=True))
    (chunk,) = Path(work.cache.root.url).glob(damaged)
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[::-1])
    with pytest.raises(CorruptSegment, match="nothing was removed from the journal"):
        compact(work.cache.fresh(), plan)
    chunk.unlink()
    with pytest.raises(CorruptSegment):
        compact(work.cache.fresh(), plan)
    assert all(answer is not None for answer in journal.find(keys, 8))
    chunk.write_bytes(whole)
    assert compact(work.cache.fresh(), plan).segments_removed == 1
