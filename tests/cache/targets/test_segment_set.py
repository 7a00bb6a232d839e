"""Several segment sets of one target set, manifests, and what a reader notices of objects that are not theirs."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.encoding.logprobs import RankTable, encoding_by_name
from potstill.cache.errors import (
    CorruptSegment,
    FormatError,
    InvalidInput,
    PotstillError,
    SpecMismatch,
    StoreError,
    TeacherFailed,
    UnsupportedField,
)
from potstill.cache.store.groups import GroupReader, GroupWriter
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.root import Root, StoredObject
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.integrity import corrupt_shard_objects, corrupt_shared_objects
from tests.support.corpora import make_corpus, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.round_trips import round_trip_fields

TOP_K = Fields(k=40)
EXTRAS = Fields(k=0, draws=20, seed=3, entropy=True, temperatures=(2.0, 0.4))


def exact(teacher: FakeTeacher, corpus: Corpus, shard: int, fields: Fields) -> Targets:
    start, stop = (int(row) for row in corpus.shard_rows[shard : shard + 2])
    return Targets.concat(asyncio.run(teacher.score(corpus.rows(start, stop), fields)))


def fill(targets: TargetSet, teacher: FakeTeacher, shards: range) -> None:
    for shard in shards:
        assert targets.write_shard(shard, exact(teacher, targets.corpus, shard, targets.fields), teacher.provenance)


def planned(cache: Cache, teacher: FakeTeacher, fields: Fields, encoding: str = "u8") -> TargetSet:
    return cache.plan_targets("fake", "docs", teacher.identity, fields=fields, encoding=encoding)


def objects(cache: Cache, *, ending: str = "") -> list[Path]:
    return sorted(p for p in (Path(cache.root.url) / "targets").rglob("*") if p.is_file() and str(p).endswith(ending))


@pytest.fixture(scope="module")
def top_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a top-k of every shard, to be copied."""
    root = tmp_path_factory.mktemp("top-k") / "c"
    cache, corpus = make_corpus(root)
    teacher = teacher_for(corpus)
    fill(planned(cache, teacher, TOP_K), teacher, range(corpus.num_shards))
    return root


@pytest.fixture
def written(top_k: Path, tmp_path: Path) -> tuple[Cache, FakeTeacher]:
    """A top-k of every shard."""
    shutil.copytree(top_k, tmp_path / "c")
    cache = Cache.open(tmp_path / "c", mode="r+")
    return cache, teacher_for(cache.corpus("docs"))


@pytest.mark.parametrize("encoding", ["u8", "archive", pytest.param("f32", marks=pytest.mark.slow)])
def test_fields_added_later_are_a_new_segment_set_and_the_first_one_is_not_touched(
    written: tuple[Cache, FakeTeacher], encoding: str
) -> None:
    cache, teacher = written
    corpus = cache.corpus("docs")
    before = {path: path.read_bytes() for path in objects(cache)}
    more = planned(cache, teacher, EXTRAS, encoding)
    assert more.fields == EXTRAS
    fill(more, teacher, range(corpus.num_shards))
    assert {path: path.read_bytes() for path in before} == before
    targets = Cache.open(cache.root.url).targets("fake", "docs")
    assert targets.fields == TOP_K.joined(EXTRAS)
    assert targets.committed.all()
    read = targets.read(0, corpus.num_positions)
    want = Targets.concat([exact(teacher, corpus, shard, targets.fields) for shard in range(corpus.num_shards)])
    assert read.draws is not None
    assert want.draws is not None
    for name in ("offsets", "ids", "counts"):
        np.testing.assert_array_equal(getattr(read.draws, name), getattr(want.draws, name))
    np.testing.assert_array_equal(read.ids, want.ids)
    ranks = RankTable.plain(teacher.identity.vocab_size)
    kept = round_trip_fields(want, EXTRAS, encoding_by_name(encoding), ranks)
    np.testing.assert_array_equal(read.entropy, kept.entropy)
    np.testing.assert_array_equal(read.log_z, kept.log_z)


def test_half_of_the_added_fields_does_not_hide_the_top_k(written: tuple[Cache, FakeTeacher]) -> None:
    cache, teacher = written
    fill(planned(cache, teacher, Fields(k=0, entropy=True)), teacher, range(1))
    targets = Cache.open(cache.root.url).targets("fake", "docs")
    assert targets.committed.tolist()[:2] == [True, False]
    assert targets.top_k_only().committed.all()
    start = int(targets.corpus.shard_starts[1])
    assert targets.read(start, start + 5, fields=TOP_K).k == TOP_K.k
    with pytest.raises(PotstillError, match="has no targets in targets/fake/docs/sets/entropy"):
        targets.read(start, start + 5)


def test_planning_gives_what_is_left_to_fill(written: tuple[Cache, FakeTeacher]) -> None:
    cache, teacher = written
    both = replace(EXTRAS, k=TOP_K.k)
    more = planned(cache, teacher, both)
    assert more.fields == EXTRAS, "the top-k is complete: only the rest is scored"
    fill(more, teacher, range(more.corpus.num_shards))
    assert planned(cache, teacher, both).committed.all()
    with pytest.raises(SpecMismatch, match="draws .* kept already"):
        planned(cache, teacher, replace(EXTRAS, draws=21))
    with pytest.raises(SpecMismatch, match="name: u8 != f16"):
        planned(cache, teacher, TOP_K, "f16")


def test_asking_for_a_field_that_is_not_kept_names_it(written: tuple[Cache, FakeTeacher]) -> None:
    cache, _ = written
    targets = cache.targets("fake", "docs")
    for fields, message in (
        (Fields(k=41), "only k=40 is kept"),
        (Fields(k=4, draws=5), "5 draws of seed 0 were asked for, none are kept"),
        (Fields(k=4, temperatures=(2.0,)), "none are kept"),
        (Fields(k=4, dense=True), "dense is not kept"),
    ):
        with pytest.raises(UnsupportedField, match=message):
            targets.read(0, 3, fields=fields)
    with pytest.raises(UnsupportedField, match="'entropy' is not a column"):
        targets.read_column("entropy", 0, 3)


def test_dense_targets_of_a_small_split(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    dense = planned(cache, teacher, Fields(k=0, dense=True), "f32")
    fill(dense, teacher, range(2))
    read = Cache.open(cache.root.url).targets("fake", "docs").read_rows([3])[0].dense
    assert read is not None
    np.testing.assert_allclose(read, teacher.dense_logprobs(corpus.row(3)), atol=1e-5)


@pytest.mark.parametrize("encoding", ["u8", "f16", "archive"])
def test_a_prefix_and_single_columns_equal_what_a_full_read_gives(tmp_path: Path, encoding: str) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    fill(planned(cache, teacher, replace(TOP_K, entropy=True), encoding), teacher, range(corpus.num_shards))
    targets = Cache.open(cache.root.url).targets("fake", "docs")
    whole = targets.read(0, corpus.num_positions, fields=TOP_K)
    for k in (1, 7, 32, 33):
        part = targets.read(0, corpus.num_positions, fields=Fields(k=k))
        assert part.entropy is None
        np.testing.assert_array_equal(part.ids, whole.ids[:, :k])
        np.testing.assert_array_equal(part.logprobs, whole.logprobs[:, :k])
        np.testing.assert_allclose(np.exp(part.log_tail), np.exp(whole.prefix(k).log_tail), atol=1e-6)
        mass = np.exp(part.logprobs.astype(np.float64)).sum(axis=1) + np.exp(part.log_tail.astype(np.float64))
        np.testing.assert_allclose(mass, 1.0, atol=1e-6)
    for name in ("log_tail", "label_logprob"):
        np.testing.assert_array_equal(targets.read_column(name, 0, corpus.num_positions), getattr(whole, name))


def test_a_prefix_read_does_not_touch_the_other_ids(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    fill(planned(cache, teacher, Fields(k=96)), teacher, range(1))
    (ids,) = objects(cache, ending="ids/c/0/0")
    data = bytearray(ids.read_bytes())
    # The second chunk of the object holds columns 32 to 64.
    index = np.frombuffer(bytes(data[-52:-4]), "<u8").reshape(3, 2)
    data[int(index[1, 0]) + 20] ^= 1
    ids.write_bytes(data)
    fresh = Cache.open(cache.root.url).targets("fake", "docs")
    assert fresh.read(0, 50, k=32).k == 32
    with pytest.raises(CorruptSegment, match="ids"):
        fresh.read(0, 50, k=33)


def test_a_complete_set_is_folded_once_and_reads_the_same_without_its_commits(
    written: tuple[Cache, FakeTeacher],
) -> None:
    cache, teacher = written
    targets = cache.targets("fake", "docs")
    before, commits = targets.read(0, 1500), targets.sets[0].commits.all()
    assert targets.fold()
    assert not targets.fold()
    assert not cache.targets("fake", "docs").fold()
    folded = Cache.open(cache.root.url).targets("fake", "docs")
    assert folded.sets[0].commits.all() == commits
    assert corrupt_shared_objects(folded.sets[0]) == []
    assert all(corrupt_shard_objects(folded.sets[0], shard) == [] for shard in range(folded.corpus.num_shards))
    shutil.rmtree(Path(cache.root.url) / "targets" / "fake" / "docs" / "commits")
    alone = Cache.open(cache.root.url).targets("fake", "docs")
    assert alone.committed.all()
    np.testing.assert_array_equal(alone.read(0, 1500).logprobs, before.logprobs)
    assert teacher.identity == alone.identity


def test_an_incomplete_set_is_not_folded(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = planned(cache, teacher, TOP_K)
    fill(targets, teacher, range(1))
    assert not targets.fold()
    assert not objects(cache, ending="manifest.json")


def test_intact_objects_in_each_others_place_are_noticed_while_reading(written: tuple[Cache, FakeTeacher]) -> None:
    """Same size, valid checksums of their own: only what the commit recorded tells them apart."""
    cache, _ = written
    corpus = cache.corpus("docs")
    good = cache.targets("fake", "docs").read(0, corpus.num_positions)
    pairs = 0
    files = [path for path in objects(cache) if "/c/" in str(path)]
    for one in files:
        for other in files:
            if one < other and one.stat().st_size == other.stat().st_size and one.read_bytes() != other.read_bytes():
                swap(one, other)
                with pytest.raises((CorruptSegment, FormatError)):
                    Cache.open(cache.root.url).targets("fake", "docs").read(0, corpus.num_positions)
                swap(one, other)
                pairs += 1
    assert pairs > 3
    read = Cache.open(cache.root.url).targets("fake", "docs").read(0, corpus.num_positions)
    np.testing.assert_array_equal(read.logprobs, good.logprobs)


def swap(one: Path, other: Path) -> None:
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def test_a_segment_of_another_teacher_is_refused(written: tuple[Cache, FakeTeacher]) -> None:
    cache, _ = written
    corpus = cache.corpus("docs")
    stranger = teacher_for(corpus, model="other")
    theirs = cache.plan_targets("other", "docs", stranger.identity, fields=TOP_K)
    fill(theirs, stranger, range(corpus.num_shards))
    base = Path(cache.root.url) / "targets"
    (base / "fake" / "docs" / "commits" / "000000.json").write_bytes(
        (base / "other" / "docs" / "commits" / "000000.json").read_bytes()
    )
    segment = theirs.sets[0].commits.all()[0].segment
    shutil.copytree(base / "other" / "docs" / "segments" / segment, base / "fake" / "docs" / "segments" / segment)
    with pytest.raises(CorruptSegment, match="is the commit of another segment set"):
        Cache.open(cache.root.url).targets("fake", "docs").read(0, 10)
    (base / "fake" / "docs" / "zarr.json").write_bytes((base / "other" / "docs" / "zarr.json").read_bytes())
    with pytest.raises(CorruptSegment, match="is the record of teacher 'other' on corpus 'docs'"):
        Cache.open(cache.root.url).targets("fake", "docs")


def test_a_writer_whose_shard_was_taken_over_loses_and_cleans_up(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = planned(cache, teacher, TOP_K)
    scored = exact(teacher, corpus, 0, TOP_K)
    assert not targets.write_shard(0, scored, teacher.provenance, still_mine=lambda: False)
    assert not targets.is_committed(0)
    assert objects(cache, ending="ids/zarr.json") == []
    assert targets.write_shard(0, scored, teacher.provenance)


def test_the_rank_table_does_not_depend_on_who_writes_first(tmp_path: Path) -> None:
    tables = []
    for name, first in (("a", 0), ("b", 5)):
        cache, corpus = make_corpus(tmp_path / name)
        teacher = teacher_for(corpus)
        targets = planned(cache, teacher, TOP_K)
        rows = targets.pilot_rows()
        pilot = asyncio.run(teacher.score([corpus.row(row) for row in rows], TOP_K))
        targets.make_ranks(Targets.concat(pilot))
        assert targets.pilot_rows() == []
        fill(targets, teacher, range(first, first + 1))
        commit = targets.sets[0].commits.all()[0]
        tables.append(commit.ranks_sha256)
    assert tables[0] == tables[1]


def test_two_whole_segments_of_one_size_that_changed_places_are_noticed(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    by_sizes: dict[tuple[int, ...], tuple[str, tuple[StoredObject, ...]]] = {}
    for seed in range(200):
        writer = GroupWriter(root, f"group-{seed}")
        # Without a pattern, and so of one size; the array of checksums now and then.
        writer.write("values", np.random.default_rng(seed).integers(0, 256, 999, np.uint8), Layout((999,)))
        written = writer.finish()
        sizes = tuple(item.size for item in written)
        if sizes in by_sizes:
            break
        by_sizes[sizes] = writer.path, written
    other, _ = by_sizes[sizes]
    shutil.rmtree(tmp_path / writer.path)
    (tmp_path / other).rename(tmp_path / writer.path)
    with pytest.raises(CorruptSegment, match=f"{writer.path}/checksums/c/0 is not the one that was committed"):
        GroupReader(root, writer.path, written).read("values", 0, 10)


def test_a_group_that_was_partly_removed_while_it_was_written_is_never_published(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "c", mode="r+")
    writer = GroupWriter(cache.root, "a")
    writer.write("first", np.arange(10), Layout((10,)))
    # As `potstill gc` does when the writer was stopped for longer than it waits.
    cache.root.delete("a")
    writer.write("second", np.arange(10), Layout((10,)))
    with pytest.raises(StoreError, match="a/first/.* was removed while its group was written; run it again"):
        writer.finish()


def test_targets_of_another_k_are_refused_before_anything_is_committed(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = planned(cache, teacher, TOP_K)
    with pytest.raises(TeacherFailed, match="k=8, targets/fake/docs keeps k=40"):
        targets.write_shard(0, exact(teacher, corpus, 0, Fields(k=8)), teacher.provenance)
    assert not targets.is_committed(0)


def test_a_drawn_id_over_the_vocabulary_makes_no_rank_table(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = planned(cache, teacher, Fields(k=0, draws=20))
    pilot = Targets.concat([teacher.targets(corpus.row(row), targets.fields) for row in targets.pilot_rows()])
    assert pilot.draws is not None
    pilot.draws.ids[-1] = 999
    with pytest.raises(TeacherFailed, match="answered id 999, its vocabulary has 256"):
        targets.make_ranks(pilot)
    assert objects(cache) == []


def test_jobs_that_add_one_field_at_the_same_moment_with_other_parameters_never_mix_them(
    written: tuple[Cache, FakeTeacher],
) -> None:
    cache, teacher = written
    corpus = cache.corpus("docs")
    hot, cold = replace(TOP_K, temperatures=(2.0,)), replace(TOP_K, temperatures=(4.0,), entropy=True)
    plans = [planned(cache, teacher, fields) for fields in (hot, cold)]
    for plan in plans:
        fill(plan, teacher, range(corpus.num_shards))
    targets = Cache.open(cache.root.url).targets("fake", "docs")
    (first, *others) = [each.spec.fields.temperatures for each in targets.sets if each.spec.fields.temperatures]
    assert others
    assert targets.fields.temperatures == first
    read, want = targets.read_rows([1])[0].log_z, teacher.targets(corpus.row(1), targets.fields).log_z
    assert read is not None
    assert want is not None
    np.testing.assert_allclose(read, want, atol=0.01)


def test_a_set_that_another_job_began_with_other_fields_is_not_taken_for_the_planned_one(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    mine, theirs = planned(cache, teacher, replace(TOP_K, draws=9)), planned(cache, teacher, TOP_K)
    assert not mine.is_committed(0)
    fill(theirs, teacher, range(corpus.num_shards))
    for look in (lambda: mine.committed, lambda: mine.is_committed(0)):
        with pytest.raises(SpecMismatch, match="draws: 0 != 9"):
            look()


def test_the_pilot_is_as_small_as_the_largest_field_asks_for(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    begun = planned(cache, teacher, TOP_K)
    assert len(begun.pilot_rows()) == 2048 * len(corpus) // corpus.num_positions
    begun.make_ranks(exact(teacher, corpus, 0, TOP_K))
    (Path(cache.root.url) / "targets" / "fake" / "docs" / "ranks.json").unlink()
    both = planned(cache, teacher, replace(TOP_K, dense=True))
    assert [each.spec.fields.dense for each in both.sets] == [False, True]
    assert len(both.pilot_rows()) == 128 * len(corpus) // corpus.num_positions


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 10**9), (3, 3)])
def test_a_range_outside_the_corpus_is_refused(written: tuple[Cache, FakeTeacher], start: int, stop: int) -> None:
    targets = written[0].targets("fake", "docs")
    for read in (lambda: targets.read(start, stop), lambda: targets.read_column("log_tail", start, stop)):
        with pytest.raises(InvalidInput, match=f"positions {start} to {stop} are outside corpus 'docs'"):
            read()


def test_more_draws_than_the_encoding_keeps_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    with pytest.raises(InvalidInput, match="at most 2048 entries or draws of a position, not 2049; take 'u8'"):
        planned(cache, teacher_for(corpus), Fields(k=0, draws=2049), "archive")
    assert planned(cache, teacher_for(corpus), Fields(k=0, draws=2049)).fields.draws == 2049
