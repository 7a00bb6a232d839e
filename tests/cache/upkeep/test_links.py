"""No symbolic link below a cache's root is followed: not by what removes, lists or writes, nor by readers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.errors import CorruptSegment
from potstill.cache.journal import Journal, JournalPolicy
from potstill.cache.store.root import Root
from potstill.clients.cli import main
from tests.support.fakes import FakeTeacher

REFUSED = "is a symbolic link, and none is followed in a cache; remove it"


@pytest.fixture
def root(flip_cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(flip_cache, tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def outside(root: Path, tmp_path: Path) -> Path:
    """A folder that is laid out like a cache, of which nothing is the cache's own."""
    shutil.copytree(root, tmp_path / "outside")
    garbage = tmp_path / "outside/targets/one/b/segments/000000-0123456789ab"
    garbage.mkdir(parents=True)
    (garbage / "thesis").write_bytes(b"all of it")
    shutil.copytree(garbage, tmp_path / "outside/journal/host-1-ab/one-000099")
    return tmp_path / "outside"


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


LINKS = [
    "targets/one",
    "targets/one/b/segments",
    "targets/one/b/segments/000000-0123456789ab",
    "targets/one/b/claims",
    "corpora/b",
    "journal/host-1-ab",
    ".potstill-tmp",
]


def plant(root: Path, link: str, outside: Path) -> None:
    """Put a link in the place of what is at a path, or of nothing."""
    shutil.rmtree(root / link, ignore_errors=True)
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    leads_to = outside / link
    leads_to.mkdir(parents=True, exist_ok=True)
    (leads_to / "kept").write_bytes(b"x")
    (root / link).symlink_to(leads_to)


@pytest.mark.parametrize("link", LINKS)
def test_gc_and_delete_leave_alone_what_a_link_leads_to_and_name_it(
    root: Path, outside: Path, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(root, link, outside)
    before = files(outside)
    assert main(["gc", str(root), "--min-age-hours", "0"]) == 1
    assert f"{link} {REFUSED}" in capsys.readouterr().err
    for what in (["--teacher", "one"], ["--corpus", "b"], ["--teacher", "one", "--journal"]):
        main(["delete", str(root), *what, "--yes"])
    assert files(outside) == before
    assert main(["gc", str(root), "--min-age-hours", "0"]) == 1, "the link itself is left to its owner"


def test_a_link_hides_no_other_garbage(root: Path, outside: Path) -> None:
    plant(root, "targets/a-link", outside)
    left = root / "targets/one/b/segments/000000-ba9876543210"
    left.mkdir()
    (left / "zarr.json").write_bytes(b"{}")
    assert main(["gc", str(root), "--min-age-hours", "0"]) == 1
    assert not left.exists()


@pytest.mark.parametrize("link", ["targets/one/b/segments", "corpora/b"])
def test_readers_and_verify_follow_none(
    root: Path, outside: Path, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(Cache.open(root).targets("one", "b").read(0, 5).ids) == 5
    plant(root, link, outside)
    with pytest.raises(CorruptSegment, match=f"{link} {REFUSED}"):
        Cache.open(root).targets("one", "b").read(0, 5)
    assert main(["verify", str(root)]) == 1
    captured = capsys.readouterr()
    assert f"{link} {REFUSED}" in captured.out + captured.err


def test_writers_follow_none(root: Path, outside: Path) -> None:
    teacher = FakeTeacher()
    journal = Journal(Root.open(root), "one", teacher.identity, JournalPolicy())
    path = journal._new_path()
    plant(root, path.rpartition("/")[0], outside)
    before = files(outside)
    with pytest.raises(CorruptSegment, match=REFUSED):
        Root.open(root).create(f"{path}.json", b"{}")
    with pytest.raises(CorruptSegment, match=REFUSED):
        journal.tidy()
    assert files(outside) == before


def test_one_object_that_is_a_link_is_refused_too(root: Path, tmp_path: Path) -> None:
    (chunk,) = (root / "targets/one/b/segments").glob("000001-*/ids/c/0/0")
    chunk.rename(tmp_path / "chunk")
    chunk.symlink_to(tmp_path / "chunk")
    targets = Cache.open(root).targets("one", "b")
    with pytest.raises(CorruptSegment, match=f"ids/c/0/0 {REFUSED}"):
        targets.read(0, targets.corpus.num_positions)


def test_the_root_itself_may_be_reached_by_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root)
    targets = Cache.open(tmp_path / "linked", mode="r+").targets("one", "b")
    assert len(targets.read(0, 5).ids) == 5
    assert main(["verify", str(tmp_path / "linked")]) == 0
    assert main(["gc", str(tmp_path / "linked"), "--min-age-hours", "0"]) == 0
