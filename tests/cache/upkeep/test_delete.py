"""Deleting: what is gone reads as never written, whatever stops in between, and what stays is untouched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.corpus import annotate
from potstill.cache.errors import (
    CorruptSegment,
    InvalidInput,
    NotCommitted,
    NotFound,
    PotstillError,
    UnknownCorpus,
    UnknownTeacher,
    UnsupportedField,
)
from potstill.cache.store.root import Root
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.delete import (
    plan_annotation,
    plan_corpus,
    plan_journal,
    plan_set,
    plan_shards,
    plan_teacher,
    remove,
)
from potstill.cache.upkeep.integrity import check_cache
from tests.support.corpora import make_corpus, plan_targets, teacher_for

GONE = (NotCommitted, UnknownTeacher, UnknownCorpus, UnsupportedField, CorruptSegment)


@pytest.fixture
def root(flip_cache: Path, tmp_path: Path) -> Root:
    copytree(flip_cache, tmp_path / "c")
    return Root.open(tmp_path / "c")


def objects(root: Root, prefix: str) -> dict[str, bytes | None]:
    return {path: root.get(f"{prefix}/{path}") for path in root.sizes(prefix)}


def problems(root: Root) -> list[str]:
    return [line for checked in check_cache(root) for line in checked.problems]


def test_a_teacher_is_deleted_and_nobody_else(root: Root) -> None:
    others = objects(root, "targets/two"), objects(root, "corpora"), objects(root, "journal")
    for removal in plan_teacher(root, "one"):
        remove(root, removal)
    assert root.sizes("targets/one") == {}
    assert (objects(root, "targets/two"), objects(root, "corpora"), objects(root, "journal")) == others
    assert Cache.open(root.url).teachers("a") == ["two"]
    with pytest.raises(UnknownTeacher, match="no targets of teacher 'one' .* there are those of: two"):
        plan_teacher(root, "one")


def test_one_target_set_is_deleted(root: Root) -> None:
    for removal in plan_teacher(root, "one", "a"):
        remove(root, removal)
    cache = Cache.open(root.url)
    with pytest.raises(UnknownTeacher):
        cache.targets("one", "a")
    assert cache.targets("one", "b").committed.all()
    with pytest.raises(UnknownTeacher, match="no targets for corpus 'a'; it has some for: b"):
        plan_teacher(root, "one", "a")


def test_one_segment_set_is_deleted_and_the_fields_of_the_other_stay(root: Root) -> None:
    before = Cache.open(root.url).targets("one", "a").read(0, 50, fields=Fields(k=6))
    with pytest.raises(NotFound, match="no segment set 'x'; there are: first, draws-5_entropy"):
        plan_set(root, "one", "a", "x")
    for removal in plan_set(root, "one", "a", "draws-5_entropy"):
        remove(root, removal)
    targets = Cache.open(root.url).targets("one", "a")
    assert targets.fields == Fields(k=6)
    np.testing.assert_array_equal(targets.read(0, 50).logprobs, before.logprobs)
    assert problems(root) == []


def test_a_deleted_shard_of_a_folded_set_is_scored_again_to_the_same_targets(root: Root) -> None:
    cache = Cache.open(root.url)
    before = cache.targets("two", "b").read(0, cache.corpus("b").num_positions)
    for removal in plan_shards(root, "two", "b", None, [1]):
        remove(root, removal)
    targets = Cache.open(root.url).targets("two", "b")
    assert targets.committed.tolist() == [shard != 1 for shard in range(targets.corpus.num_shards)]
    start = int(targets.corpus.shard_starts[1])
    with pytest.raises(NotCommitted):
        targets.read(start, start + 1)
    with pytest.raises(NotFound, match=r"shard 1 of targets/two/b has no commit; `potstill gc`"):
        plan_shards(root, "two", "b", None, [1])
    assert problems(root) == []
    build_again(root)
    again = Cache.open(root.url).targets("two", "b").read(0, before.num_positions)
    for name in ("ids", "logprobs", "log_tail", "entropy", "log_z"):
        np.testing.assert_array_equal(getattr(again, name), getattr(before, name))


def build_again(root: Root) -> None:
    import asyncio

    from potstill.cache.types import Targets

    cache = Cache.open(root.url, mode="r+")
    corpus = cache.corpus("b")
    teacher = teacher_for(corpus, model="fake-two")
    fields, encoding = cache.targets("two", "b").fields, cache.targets("two", "b").encoding.name
    targets = cache.plan_targets("two", "b", teacher.identity, fields=fields, encoding=encoding)
    first, last = corpus.shard_rows[1:3].tolist()
    exact = Targets.concat(asyncio.run(teacher.score(corpus.rows(first, last), fields)))
    assert targets.write_shard(1, exact, teacher.provenance)


def test_a_shard_whose_commit_and_manifest_are_damaged_can_be_deleted(root: Root) -> None:
    folder = Path(root.url) / "targets" / "two" / "b"
    for path in (folder / "manifest.json", folder / "commits" / "000000.json"):
        path.write_bytes(path.read_bytes().replace(b'"format": 2', b'"format": x'))
    assert problems(root)
    for removal in plan_shards(root, "two", "b", None, [0]):
        remove(root, removal)
    assert problems(root) == []
    assert len(list((folder / "segments").iterdir())) == Cache.open(root.url).corpus("b").num_shards - 1


def test_a_shard_whose_commit_is_lost_while_the_manifest_has_it_can_be_deleted(root: Root) -> None:
    folder = Path(root.url) / "targets" / "two" / "b"
    (folder / "commits" / "000000.json").unlink()
    assert problems(root)
    for removal in plan_shards(root, "two", "b", None, [0]):
        remove(root, removal)
    assert problems(root) == []
    assert not Cache.open(root.url).targets("two", "b").is_committed(0)
    with pytest.raises(NotFound, match="shard 0 of targets/two/b has no commit"):
        plan_shards(root, "two", "b", None, [0])


def test_a_corpus_goes_with_everything_of_it(root: Root) -> None:
    others = objects(root, "corpora/b"), objects(root, "targets/two/b")
    for removal in plan_corpus(root, "a"):
        remove(root, removal)
    assert [path for path in root.sizes("") if "/a/" in path] == []
    assert (objects(root, "corpora/b"), objects(root, "targets/two/b")) == others
    with pytest.raises(UnknownCorpus, match="no corpus 'a' .* there are: b"):
        plan_corpus(root, "a")


def test_one_annotation_is_deleted_and_its_name_is_free_again(root: Root) -> None:
    corpus = Cache.open(root.url).corpus("a")
    before = objects(root, "corpora/a")
    for name in ("contaminated", "contaminated-2"):
        annotate(root, corpus.annotated, name, np.ones(len(corpus), np.bool_), {})
    with pytest.raises(
        NotFound, match="corpus 'a' has no annotation 'x'; there are: contaminated, contaminated-2, held"
    ):
        plan_annotation(root, "a", "x")
    for removal in plan_annotation(root, "a", "contaminated"):
        remove(root, removal)
    assert "contaminated" not in corpus.annotations()
    annotate(root, corpus.annotated, "contaminated", np.zeros(len(corpus), np.bool_), {})
    assert not corpus.annotation("contaminated").any()
    for name in ("contaminated", "contaminated-2"):
        for removal in plan_annotation(root, "a", name):
            remove(root, removal)
    assert objects(root, "corpora/a") == before


def test_a_journal_of_one_teacher_is_deleted(root: Root) -> None:
    for removal in plan_journal(root, "one"):
        remove(root, removal)
    assert {path.split("/")[-1].split("-")[0] for path in root.sizes("journal") if path.endswith(".json")} == {
        "two",
        "zarr.json",
    }
    with pytest.raises(NotFound, match="teacher 'one' has no journal .* there are journals of: two"):
        plan_journal(root, "one")


class StoppedError(Exception):
    """In place of a kill."""


class StoppingRoot(Root):
    """A root whose process is killed before the n-th removal of something that is there."""

    stops_at = 10**9

    def _count(self) -> None:
        self.stops_at -= 1
        if self.stops_at < 0:
            raise StoppedError

    def remove(self, path: str) -> None:
        if self.get(path) is not None:
            self._count()
        super().remove(path)

    def delete(self, prefix: str) -> None:
        self._count()
        super().delete(prefix)


@pytest.mark.parametrize(
    "plan",
    [
        lambda root: plan_teacher(root, "two"),
        lambda root: plan_corpus(root, "a"),
        lambda root: plan_shards(root, "two", "b", None, [0, 1]),
    ],
    ids=["teacher", "corpus", "shards"],
)
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_deletion_that_stops_anywhere_leaves_no_commit_of_nothing_and_can_be_finished(
    flip_cache: Path, tmp_path: Path, plan: Callable[[Root], list[object]], every: int
) -> None:
    """Looked at after every so many stops."""
    copytree(flip_cache, tmp_path / "c")
    root = StoppingRoot.open(tmp_path / "c")
    for stop in range(100):
        root.stops_at = 1
        try:
            for removal in plan(root):
                remove(root, removal)  # type: ignore[arg-type]
        except StoppedError:
            if stop % every == 0:
                left = problems(Root.open(tmp_path / "c"))
                assert [line for line in left if "no corpus" not in line and "zarr.json is missing" not in line] == []
            continue
        except NotFound:
            pass
        break
    else:
        pytest.fail("it never finished")
    with pytest.raises(NotFound):
        plan(root)
    assert problems(Root.open(tmp_path / "c")) == []


def test_readers_meanwhile_are_told_and_never_read_wrong_numbers(root: Root) -> None:
    opened = Cache.open(root.url).targets("two", "b")
    right = {row: opened.read_rows([row])[0].logprobs.tobytes() for row in range(len(opened.corpus))}
    outcomes: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            outcomes.extend(outcome(opened, row, logprobs) for row, logprobs in right.items())
            try:
                again = Cache.open(root.url).targets("two", "b")
            except GONE as error:
                outcomes.append(error.kind)
            else:
                outcomes.extend(outcome(again, row, logprobs) for row, logprobs in right.items())

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for removal in [*plan_shards(root, "two", "b", None, [0]), *plan_teacher(root, "two")]:
        remove(root, removal)
    while "unknown_teacher" not in outcomes and any(reader.is_alive() for reader in readers):
        pass
    done.set()
    for reader in readers:
        reader.join()
    assert set(outcomes) <= {"right", *(error.kind for error in GONE)}


def outcome(targets: TargetSet, row: int, logprobs: bytes) -> str:
    try:
        return "right" if targets.read_rows([row])[0].logprobs.tobytes() == logprobs else "wrong numbers"
    except PotstillError as error:
        return error.kind


def test_the_command_says_what_goes_and_asks(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.cache.commands import delete

    def run(*arguments: str) -> int:
        import argparse

        parser = argparse.ArgumentParser()
        delete.add_arguments(parser)
        return delete.run(parser.parse_args([root.url, *arguments]))

    with pytest.raises(InvalidInput, match="no terminal to ask on; add --yes"):
        run("--teacher", "two")
    for wrong in (
        ["--journal"],
        ["--shard", "1", "--teacher", "two"],
        ["--set", "first"],
        ["--corpus", "a", "--journal"],
        ["--annotation", "contaminated"],
    ):
        with pytest.raises(InvalidInput):
            run(*wrong)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    capsys.readouterr()
    assert run("--teacher", "two") == 1
    assert "targets/two/b: " in capsys.readouterr().out
    assert Cache.open(root.url).teachers("b") == ["one", "two"]
    assert run("--teacher", "two", "--yes") == 0
    assert Cache.open(root.url).teachers("b") == ["one"]


def test_a_set_that_a_job_is_filling_is_left_alone(tmp_path: Path) -> None:
    from potstill.cache.commands import delete
    from potstill.cache.store.claims import Claims

    cache, corpus = make_corpus(tmp_path / "c")
    targets = plan_targets(cache, teacher_for(corpus))
    import argparse

    parser = argparse.ArgumentParser()
    delete.add_arguments(parser)
    with Claims(cache.root, targets.claims_path) as claims:
        assert claims.take("000000") is not None
        with pytest.raises(InvalidInput, match="a job seems to be filling targets/fake/docs; stop it"):
            delete.run(parser.parse_args([str(tmp_path / "c"), "--teacher", "fake", "--yes"]))
