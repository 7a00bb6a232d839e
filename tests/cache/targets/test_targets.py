from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from potstill.cache import Cache, Fields, Targets
from potstill.cache.commands import gc, verify
from potstill.cache.errors import (
    CorruptSegment,
    FormatError,
    InvalidInput,
    NotCommitted,
    SpecMismatch,
    TeacherFailed,
    UnknownTeacher,
    UnsupportedField,
)
from potstill.cache.store.root import Root
from potstill.cache.targets.commit import segment_path
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.garbage import find_garbage
from potstill.cache.upkeep.integrity import corrupt_shard_objects
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher, fake_identity


def shard_targets(targets: TargetSet, teacher: FakeTeacher, shard: int) -> Targets:
    start, stop = targets.corpus.shard_rows[shard : shard + 2]
    rows = targets.corpus.rows(int(start), int(stop))
    return Targets.concat([teacher.distribution(row, targets.fields.k) for row in rows])


def write(targets: TargetSet, teacher: FakeTeacher, *shards: int) -> None:
    for shard in shards:
        assert targets.write_shard(shard, shard_targets(targets, teacher, shard), teacher.provenance)


def verify_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args(words))


@pytest.fixture
def two_shards(tmp_path: Path) -> tuple[Cache, TargetSet, FakeTeacher]:
    """Shards 0 and 2 committed, the others not."""
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher)
    write(targets, teacher, 0, 2)
    return cache, targets, teacher


def test_what_was_written_is_read_back_within_the_bound(two_shards: tuple[Cache, TargetSet, FakeTeacher]) -> None:
    cache, _, teacher = two_shards
    targets = cache.targets("fake", "docs")
    assert targets.committed.tolist()[:3] == [True, False, True]
    start, stop = (int(p) for p in targets.corpus.shard_starts[2:4])
    read, exact = targets.read(start, stop), shard_targets(targets, teacher, 2)
    assert np.array_equal(read.ids, exact.ids)
    assert np.abs(read.logprobs - exact.logprobs).max() <= targets.encoding.max_abs_error
    row = int(targets.corpus.shard_rows[2]) + 3
    answer = targets.read_rows([row, 0])
    np.testing.assert_array_equal(answer[0].ids, teacher.distribution(targets.corpus.row(row), 16).ids)
    assert answer[1].num_positions == len(targets.corpus.row(0))


def test_reads_cross_shards_and_any_cut_gives_the_same_bits(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher)
    write(targets, teacher, *range(corpus.num_shards))
    whole = targets.read(0, corpus.num_positions)
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = sorted(rng.choice(corpus.num_positions, 2, replace=False).tolist())
        part = targets.read(a, b)
        assert np.array_equal(part.logprobs, whole.logprobs[a:b])
        assert np.array_equal(part.ids, whole.ids[a:b])


def test_reading_where_nothing_is_committed_says_which_shard(two_shards: tuple[Cache, TargetSet, FakeTeacher]) -> None:
    _, targets, _ = two_shards
    with pytest.raises(NotCommitted, match="shard 1 of corpus 'docs' has no targets in targets/fake/docs yet"):
        targets.read(0, targets.corpus.num_positions)
    with pytest.raises(InvalidInput, match="are outside corpus"):
        targets.read(0, targets.corpus.num_positions + 1)
    with pytest.raises(InvalidInput, match="row 99999 is outside"):
        targets.read_rows([99_999])
    with pytest.raises(UnsupportedField, match="only k=16 is kept"):
        targets.read(0, 10, k=17)
    with pytest.raises(InvalidInput, match="k is -1"):
        targets.read(0, 10, k=-1)
    with pytest.raises(InvalidInput, match="fields ask for nothing"):
        targets.read(0, 10, k=0)
    with pytest.raises(UnsupportedField, match="entropy is not kept; ask for what is kept, or add it"):
        targets.read(0, 10, fields=Fields(k=3, entropy=True))
    assert targets.read(0, 10, k=3).k == 3


def test_an_open_reader_sees_shards_that_are_committed_later(
    two_shards: tuple[Cache, TargetSet, FakeTeacher],
) -> None:
    cache, targets, teacher = two_shards
    reader = Cache.open(cache.root.url).targets("fake", "docs")
    start = int(targets.corpus.shard_starts[1])
    with pytest.raises(NotCommitted):
        reader.read(start, start + 1)
    write(targets, teacher, 1)
    assert reader.read(start, start + 1).num_positions == 1


def test_a_stranger_reads_a_segment_with_zarr_alone(two_shards: tuple[Cache, TargetSet, FakeTeacher]) -> None:
    cache, targets, teacher = two_shards
    folder = Path(cache.root.url) / "targets" / "fake" / "docs"
    commit = json.loads((folder / "commits" / "000002.json").read_text())
    ranks = json.loads((folder / "ranks.json").read_text())

    def array(path: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        return np.asarray(zarr.open_array(folder / path, mode="r")[:])

    segment = f"segments/{commit['segment']}"
    exact = shard_targets(targets, teacher, 2)
    assert np.array_equal(array(f"{ranks['group']}/ids_by_rank")[array(f"{segment}/ids")], exact.ids)
    fallen = np.cumsum(array(f"{segment}/gaps").astype(np.int64), axis=1) / 16
    np.testing.assert_allclose(fallen, exact.logprobs[:, :1] - exact.logprobs[:, 1:], atol=1 / 32 + 1e-5)
    np.testing.assert_allclose(
        np.exp(array(f"{segment}/log_tail").astype(np.float64)), np.exp(exact.log_tail), rtol=5e-3
    )
    assert commit["error"]["max_abs"] <= 1 / 16 + 1e-3


def test_of_many_writers_of_one_shard_one_wins_and_no_garbage_stays(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    exact = shard_targets(plan_targets(cache, teacher), teacher, 0)
    won = []

    def race() -> None:
        mine = plan_targets(Cache.open(tmp_path / "c", mode="r+"), teacher)
        won.append(mine.write_shard(0, exact, teacher.provenance))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    assert find_garbage(cache.root, min_age_seconds=0) == []
    assert corrupt(cache, 0) == []


class BegunMeanwhile(Root):
    """A root in which another job begins the set of `fake`, right after this one found that there is none."""

    def get(self, path: str) -> bytes | None:
        found = super().get(path)
        if path == "targets/fake/docs/zarr.json" and found is None:
            other = Cache.open(self.url, mode="r+")
            teacher = teacher_for(other.corpus("docs"))
            plan_targets(other, teacher).make_ranks(teacher.distribution(other.corpus("docs").row(0), 16))
        return found


def test_a_set_that_another_job_begins_meanwhile_is_joined(tmp_path: Path) -> None:
    _, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    cache = Cache.open(tmp_path / "c", mode="r+")
    cache.root = BegunMeanwhile.open(tmp_path / "c")
    targets = plan_targets(cache, teacher)
    write(targets, teacher, 0)
    assert [each.path for each in Cache.open(tmp_path / "c").targets("fake", "docs").sets] == ["targets/fake/docs"]


def test_another_spec_under_the_same_name_is_refused(two_shards: tuple[Cache, TargetSet, FakeTeacher]) -> None:
    cache, targets, teacher = two_shards
    with pytest.raises(SpecMismatch, match="k 16 is kept already, 8 was asked for"):
        plan_targets(cache, teacher, k=8)
    with pytest.raises(SpecMismatch, match="'u8' != |u8 != f16|name: u8 != f16"):
        plan_targets(cache, teacher, encoding="f16")
    with pytest.raises(SpecMismatch, match=r"weights_sha256: '\w+' != '\w+'\); use another"):
        plan_targets(cache, teacher_for(targets.corpus, model="other"))


def test_a_teacher_that_does_not_fit_the_corpus_is_refused_and_nothing_written(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    with pytest.raises(SpecMismatch, match="ingest the text again with the teacher's tokenizer"):
        plan_targets(cache, FakeTeacher(fake_identity(vocab_size=256, tokenizer_sha256="1" * 64)))
    small = FakeTeacher(fake_identity(vocab_size=10, tokenizer_sha256=corpus.tokenizer_sha256))
    with pytest.raises(SpecMismatch, match="knows 10 ids"):
        plan_targets(cache, small, k=4)
    with pytest.raises(InvalidInput, match="was opened to read"):
        Cache.open(tmp_path / "c").plan_targets("fake", "docs", teacher_for(corpus).identity, fields=Fields())
    with pytest.raises(
        UnknownTeacher,
        match="has no targets for corpus .* no teacher has any yet; make them with `potstill prefill --cache ",
    ):
        cache.targets("fake", "docs")
    assert not (tmp_path / "c" / "targets").exists()


def corrupt(cache: Cache, shard: int) -> list[str]:
    """Verify one shard, opened anew."""
    return corrupt_shard_objects(Cache.open(cache.root.url).targets("fake", "docs").sets[0], shard)


def stored_files(targets: TargetSet, cache: Cache, shard: int) -> list[Path]:
    commit = targets.sets[0].commits.of(shard)
    assert commit is not None
    folder = Path(cache.root.url) / segment_path(targets.sets[0].path, commit.segment)
    return [folder / item.path for item in commit.objects]


def test_a_flipped_byte_in_any_object_is_found_by_verify_and_never_read_as_numbers(
    two_shards: tuple[Cache, TargetSet, FakeTeacher],
) -> None:
    cache, targets, _ = two_shards
    start, stop = (int(p) for p in targets.corpus.shard_starts[2:4])
    good = targets.read(start, stop)
    for file in stored_files(targets, cache, 2):
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 0x10
        file.write_bytes(damaged)
        fresh = Cache.open(cache.root.url).targets("fake", "docs")
        assert any(file.name in line for line in corrupt(cache, 2)), file
        if file.parent.name.startswith("000002-"):
            # The group's own metadata decides nothing.
            assert np.array_equal(fresh.read(start, stop).logprobs, good.logprobs)
        else:
            with pytest.raises(CorruptSegment, match="segments/000002-"):
                fresh.read(start, stop)
        file.write_bytes(original)


def test_a_commit_of_another_shard_or_format_is_refused(two_shards: tuple[Cache, TargetSet, FakeTeacher]) -> None:
    cache, targets, _ = two_shards
    commits = Path(cache.root.url) / "targets" / "fake" / "docs" / "commits"
    (commits / "000001.json").write_bytes((commits / "000002.json").read_bytes())
    start = int(targets.corpus.shard_starts[1])
    fresh = Cache.open(cache.root.url).targets("fake", "docs")
    with pytest.raises(CorruptSegment, match="is the commit of shard 2, not of shard 1"):
        fresh.read(start, start + 1)
    for broken, message in (("{}", "no format version"), ("x", "is not JSON"), ('{"format": 9}', "install a newer")):
        (commits / "000001.json").write_text(broken)
        with pytest.raises(FormatError, match=message):
            Cache.open(cache.root.url).targets("fake", "docs").read(start, start + 1)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("lost", ["answer", "all"])
def test_a_commit_whose_answer_is_lost_keeps_its_segment(
    two_shards: tuple[Cache, TargetSet, FakeTeacher], monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The record is there, but the call that made it failed or was tried again: its segment must stay."""
    cache, targets, teacher = two_shards
    create = Root.create

    def create_twice(self: Root, path: str, data: bytes) -> bool:
        assert create(self, path, data)
        if lost == "all":
            raise Interrupted
        return create(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Root, "create", create_twice)
        if lost == "all":
            with pytest.raises(Interrupted):
                write(targets, teacher, 1)
        else:
            write(targets, teacher, 1)
    fresh = cache.targets("fake", "docs")
    assert fresh.committed[1]
    assert corrupt(cache, 1) == []
    assert find_garbage(cache.root, min_age_seconds=0) == []


def test_a_set_that_lost_its_record_is_reported_and_its_segments_are_no_garbage(
    two_shards: tuple[Cache, TargetSet, FakeTeacher], capsys: pytest.CaptureFixture[str]
) -> None:
    cache, _, _ = two_shards
    (Path(cache.root.url) / "targets" / "fake" / "docs" / "zarr.json").unlink()
    assert verify_command(cache.root.url) == 1
    assert "targets/fake/docs/zarr.json is missing, and there are commits" in capsys.readouterr().out
    assert find_garbage(cache.root, min_age_seconds=0) == []


def test_stray_files_are_no_part_of_a_cache(two_shards: tuple[Cache, TargetSet, FakeTeacher]) -> None:
    cache, _, _ = two_shards
    for place in ("targets/.DS_Store", "corpora/README", "targets/fake/.DS_Store", "targets/.cache/x", "notes.txt"):
        stray = Path(cache.root.url) / place
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("stray")
    assert cache.corpora() == ["docs"]
    assert cache.teachers("docs") == ["fake"]
    assert verify_command(cache.root.url, "--json") == 0


def test_an_id_over_the_vocabulary_in_the_first_shard_is_the_teachers_failure(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher)
    good = shard_targets(targets, teacher, 0)
    ids = good.ids.copy()
    ids[0, 0] = 256
    bad = Targets(ids=ids, logprobs=good.logprobs, log_tail=good.log_tail, label_logprob=good.label_logprob)
    with pytest.raises(TeacherFailed, match="answered id 256, its vocabulary has 256"):
        targets.write_shard(0, bad, teacher.provenance)
    assert not (tmp_path / "c" / "targets").exists()


def test_gc_removes_only_what_no_commit_names(
    two_shards: tuple[Cache, TargetSet, FakeTeacher], capsys: pytest.CaptureFixture[str]
) -> None:
    cache, _, _ = two_shards
    segments = Path(cache.root.url) / "targets" / "fake" / "docs" / "segments"
    (segments / "000001-dead" / "ids").mkdir(parents=True)
    (segments / "000001-dead" / "ids" / "zarr.json").write_text("{}")
    assert gc.run(argparse.Namespace(cache=cache.root.url, dry_run=False, min_age_hours=1.0)) == 0
    assert (segments / "000001-dead").exists(), "a live writer may still be at it"
    assert gc.run(argparse.Namespace(cache=cache.root.url, dry_run=True, min_age_hours=0.0)) == 0
    assert "000001-dead" in capsys.readouterr().out
    assert gc.run(argparse.Namespace(cache=cache.root.url, dry_run=False, min_age_hours=0.0)) == 0
    assert not (segments / "000001-dead").exists()
    assert [corrupt(cache, shard) for shard in (0, 2)] == [[], []]
