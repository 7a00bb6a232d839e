from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.commands import gc
from potstill.cache.corpus.annotations import annotate
from potstill.cache.errors import FormatError
from potstill.cache.store.local_files import TEMPORARY
from potstill.cache.store.root import LONGEST_NAME, Root
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.delete import plan_set, remove
from potstill.cache.upkeep.garbage import find_garbage, remove_garbage
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher

WITH_ENTROPY = Fields(k=16, entropy=True)


def score(teacher: FakeTeacher, targets: TargetSet, shard: int) -> Targets:
    start, stop = (int(row) for row in targets.corpus.shard_rows[shard : shard + 2])
    return Targets.concat([teacher.targets(row, WITH_ENTROPY) for row in targets.corpus.rows(start, stop)])


def fill(teacher: FakeTeacher, targets: TargetSet) -> None:
    for shard in range(targets.corpus.num_shards):
        targets.write_shard(shard, score(teacher, targets, shard), teacher.provenance)
    targets.fold()


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache: a corpus with an annotation, and a complete target set of two segment sets."""
    root = tmp_path_factory.mktemp("complete") / "c"
    cache, corpus = make_corpus(root)
    annotate(cache.root, corpus.annotated, "held-out", np.arange(len(corpus)) % 7 == 0, {})
    teacher = teacher_for(corpus)
    fill(teacher, plan_targets(cache, teacher))
    fill(teacher, cache.plan_targets("fake", "docs", teacher.identity, fields=WITH_ENTROPY, encoding="u8"))
    return root


@pytest.fixture
def cache(complete: Path, tmp_path: Path) -> Cache:
    """A copy of the complete cache."""
    shutil.copytree(complete, tmp_path / "c")
    return Cache.open(tmp_path / "c")


def here(cache: Cache) -> Path:
    return Path(cache.root.url)


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def put(folder: Path) -> str:
    """A group that some writer left."""
    (folder / "values").mkdir(parents=True)
    (folder / "zarr.json").write_text("{}")
    (folder / "values" / "0").write_bytes(b"x" * 100)
    return folder.name


def found(cache: Cache, skipped: list[str] | None = None) -> list[str]:
    lines = [] if skipped is None else skipped
    return sorted(item.path for item in find_garbage(cache.root, min_age_seconds=0, on_skip=lines.append))


LEFT = [
    "claims",
    "corpora/docs/annotations/held-out-0123456789ab",
    "corpora/docs/data-0123456789ab",
    "corpora/never-sealed/data-0123456789ab",
    "journal/host-1-ab/fake-000000",
    "targets/fake/docs/claims",
    "targets/fake/docs/manifest-0123456789ab",
    "targets/fake/docs/ranks-0123456789ab",
    "targets/fake/docs/segments/000001-0123456789ab",
    "targets/fake/docs/segments/000001-ba9876543210",
    "targets/fake/docs/sets/entropy/manifest-0123456789ab",
    "targets/fake/docs/sets/entropy/segments/000000-0123456789ab",
]


def test_what_writers_left_is_found_everywhere_and_nothing_else_is_touched(cache: Cache) -> None:
    paths = [each.path for each in cache.targets("fake", "docs").sets]
    assert paths == ["targets/fake/docs", "targets/fake/docs/sets/entropy"]
    assert found(cache) == []
    before = files(here(cache))
    for path in LEFT:
        put(here(cache) / path)
    (here(cache) / TEMPORARY).mkdir(exist_ok=True)
    (here(cache) / TEMPORARY / "half").write_bytes(b"x")
    garbage = find_garbage(cache.root, min_age_seconds=0)
    assert sorted(item.path for item in garbage) == sorted([TEMPORARY, *LEFT])
    assert {item.size for item in garbage} == {1, 102}
    assert all(remove_garbage(cache.root, item) for item in garbage)
    assert files(here(cache)) == before
    assert found(cache) == []


def test_a_journal_group_of_the_longest_teachers_name_is_found(cache: Cache) -> None:
    path = f"journal/host-1-ab/{'t' * LONGEST_NAME}-000000"
    put(here(cache) / path)
    assert found(cache) == [path]


def test_what_was_written_to_lately_may_have_a_writer(cache: Cache) -> None:
    put(here(cache) / LEFT[0])
    assert find_garbage(cache.root, min_age_seconds=3600) == []
    assert find_garbage(cache.root, min_age_seconds=0)[0].age_seconds < 3600


def test_what_is_written_to_after_it_was_found_is_kept(cache: Cache) -> None:
    claims = here(cache) / "targets/fake/docs/claims"
    put(claims)
    day_ago = time.time() - 86400
    for path in claims.rglob("*"):
        os.utime(path, (day_ago, day_ago))
    [item] = find_garbage(cache.root, min_age_seconds=3600)
    (claims / "000000.json").write_text("{}")
    assert not remove_garbage(cache.root, item)
    assert (claims / "000000.json").exists()


def test_an_uncommitted_shard_keeps_no_segment(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher)
    targets.write_shard(0, replace(score(teacher, targets, 0), entropy=None), teacher.provenance)
    put(tmp_path / "c/targets/fake/docs/segments/000001-0123456789ab")
    assert found(cache) == ["targets/fake/docs/segments/000001-0123456789ab"]


def test_a_group_that_came_to_be_named_is_kept(cache: Cache) -> None:
    root = here(cache)
    targets = root / "targets/fake/docs"
    commit, segment = targets / "commits/000001.json", next(targets.glob("segments/000001-*"))
    seal = root / "corpora/docs/zarr.json"
    journal = root / "journal/host-1-ab/fake-000000"
    put(journal)
    put(root / "corpora/other/data-0123456789ab")
    whole = {path: path.read_bytes() for path in (commit, seal)}
    commit.unlink()
    (targets / "manifest.json").unlink()
    garbage = {item.path: item for item in find_garbage(cache.root, min_age_seconds=0)}
    commit.write_bytes(whole[commit])
    journal.with_suffix(".json").write_text("{}")
    (root / "corpora/other/zarr.json").write_text('{"data": "data-0123456789ab"}')
    for path in (segment, journal, root / "corpora/other/data-0123456789ab"):
        assert not remove_garbage(cache.root, garbage[str(path.relative_to(root))])
        assert len(list(path.iterdir())) > 1


@pytest.mark.parametrize(
    ("record", "spared"),
    [
        ("corpora/docs/zarr.json", ["corpora/docs/data-0123456789ab"]),
        ("corpora/docs/annotations/held-out.json", ["corpora/docs/annotations/held-out-0123456789ab"]),
        ("targets/fake/docs/ranks.json", ["targets/fake/docs/ranks-0123456789ab"]),
        ("targets/fake/docs/manifest.json", ["targets/fake/docs/manifest-0123456789ab"]),
        ("targets/fake/docs/commits/000001.json", [path for path in LEFT if "docs/segments/000001" in path]),
        ("targets/fake/docs/zarr.json", [path for path in LEFT if "docs/segments" in path or "docs/ma" in path]),
        ("targets/fake/docs/sets/entropy/zarr.json", [path for path in LEFT if "entropy" in path]),
        ("journal/host-1-ab/fake-000001.json", ["journal/host-1-ab/fake-000000"]),
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "newer"])
def test_where_a_record_cannot_be_read_nothing_is_garbage(
    cache: Cache, record: str, spared: list[str], damage: str
) -> None:
    for path in LEFT:
        put(here(cache) / path)
    file = here(cache) / record
    if not file.exists():
        file.write_bytes((here(cache) / "targets/fake/docs/ranks.json").read_bytes().replace(b'"ranks"', b'"journal"'))
    data = file.read_bytes()
    changed = {
        "flipped": data.replace(b"objects", b"object_").replace(b"identity", b"identitx"),
        "cut": data[: len(data) // 2],
        "newer": re.sub(rb'"format": [23]', b'"format": 4', data),
    }[damage]
    assert changed != data
    file.write_bytes(changed)
    skipped: list[str] = []
    left = found(cache, skipped)
    assert not set(spared) & set(left)
    assert len(left) >= len(LEFT) - 3 - len(spared)
    assert any(record in line for line in skipped)


def test_a_corpus_that_lost_its_seal_is_spared_while_something_is_of_it(cache: Cache) -> None:
    (here(cache) / "corpora/docs/zarr.json").unlink()
    skipped: list[str] = []
    assert found(cache, skipped) == []
    assert skipped == ["corpora/docs/zarr.json is missing, and targets or annotations of the corpus are there"]
    (here(cache) / "corpora/docs/annotations/held-out.json").unlink()
    assert [path.rpartition("-")[0] for path in found(cache)] == ["corpora/docs/annotations/held-out"]
    shutil.rmtree(here(cache) / "corpora/docs/annotations")
    assert found(cache) == []
    shutil.rmtree(here(cache) / "targets")
    assert [path.partition("-")[0] for path in found(cache)] == ["corpora/docs/data"]


@pytest.mark.parametrize("undone", [1, 2])
def test_what_a_stopped_deletion_leaves_is_garbage(cache: Cache, undone: int) -> None:
    (removal,) = plan_set(cache.root, "fake", "docs", "entropy")
    remove(cache.root, replace(removal, phases=removal.phases[:-undone]))
    assert (here(cache) / "targets/fake/docs/sets/entropy/zarr.json").exists() == (undone == 2)
    left = found(cache)
    assert any(path.startswith("targets/fake/docs/sets/entropy/segments/") for path in left)
    assert all(path.startswith("targets/fake/docs/sets/entropy/") for path in left)


def test_a_shard_whose_commit_is_lost_keeps_the_segment_that_the_manifest_names(cache: Cache) -> None:
    put(here(cache) / "targets/fake/docs/segments/000001-0123456789ab")
    (here(cache) / "targets/fake/docs/commits/000001.json").unlink()
    assert found(cache) == ["targets/fake/docs/segments/000001-0123456789ab"]


class CountingRoot(Root):
    """Counts what it is asked."""

    asked = 0

    def get(self, path: str) -> bytes | None:
        self.asked += 1
        return super().get(path)

    def folders(self, prefix: str, *, longest: int = LONGEST_NAME) -> list[str]:
        self.asked += 1
        return super().folders(prefix, longest=longest)

    def versions(self, prefix: str) -> dict[str, str]:
        self.asked += 1
        return super().versions(prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        self.asked += 1
        return super().sizes(prefix)


def test_what_is_asked_of_the_store_does_not_grow_with_the_segments(tmp_path: Path) -> None:
    asked = []
    for name, shard_positions in (("few", 2000), ("many", 100)):
        cache, corpus = make_corpus(tmp_path / name, shard_positions=shard_positions)
        teacher = teacher_for(corpus)
        targets = plan_targets(cache, teacher)
        for shard in range(corpus.num_shards):
            targets.write_shard(shard, replace(score(teacher, targets, shard), entropy=None), teacher.provenance)
        root = CountingRoot.open(tmp_path / name)
        assert find_garbage(root, min_age_seconds=0) == []
        asked.append((corpus.num_shards, root.asked))
    assert asked[1][0] > 5 * asked[0][0]
    assert asked[0][1] == asked[1][1]


def test_the_command_removes_what_it_can_and_says_what_it_left_alone(
    cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*, hours: float = 0.0, dry_run: bool = False) -> str:
        assert gc.run(argparse.Namespace(cache=cache.root.url, min_age_hours=hours, dry_run=dry_run)) == 0
        return capsys.readouterr().out

    group, segment = LEFT[1], LEFT[-1]
    put(here(cache) / group)
    put(here(cache) / segment)
    assert "2 more groups are younger than 24 h" in run(hours=24)
    assert run(dry_run=True).endswith("2 groups of 204 bytes would be removed\n")
    assert f"{group}  102 bytes\n" in run()
    assert found(cache) == []
    put(here(cache) / group)
    put(here(cache) / segment)
    (here(cache) / "targets/fake/docs/sets/entropy/zarr.json").write_text("{")
    with pytest.raises(FormatError, match=r"sets/entropy/zarr.json is not JSON.*; what it may name was left alone$"):
        run()
    assert "1 group of 102 bytes removed" in capsys.readouterr().out
    assert not (here(cache) / group).exists()
    assert (here(cache) / segment).exists()
