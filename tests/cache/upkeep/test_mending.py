"""What a person is told about damage, gaps and wrong names: the told lines mend it, and nothing else goes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from shutil import copytree

import pytest

from potstill.cache import Cache, Fields
from potstill.cache.commands.field_options import add_field_options, fields_of
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import CorruptSegment, NotCommitted, StoreError, UnsupportedField
from potstill.cache.store.root import Root
from potstill.cache.targets.set_spec import SetSpec
from potstill.cache.upkeep.integrity import check_cache
from tests.support.command_line import refused, run
from tests.support.corpora import make_corpus, teacher_for
from tests.support.fakes import fake_identity
from tests.support.filled_caches import commit, filled_cache
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.scored_rows import assert_same

EXTRAS = Fields(k=0, draws=5, seed=3, entropy=True)


@pytest.fixture
def two_sets(tmp_path: Path) -> Cache:
    """A complete top-k, and draws and entropy of all but the last shard."""
    cache = filled_cache(tmp_path / "c", Fields(k=6), missing=0)
    teacher = teacher_for(cache.corpus("docs"))
    more = cache.plan_targets("fake", "docs", teacher.identity, fields=EXTRAS)
    commit(more, teacher, range(more.corpus.num_shards - 1))
    return Cache.open(tmp_path / "c")


def damage(root: Path, pattern: str) -> None:
    (chunk,) = root.glob(pattern)
    chunk.write_bytes(chunk.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("place", "words", "options"),
    [
        ("segments/000001-*/ids/c/0/0", "--set first --shard 1", "--top-k 6"),
        ("sets/draws-5_entropy/segments/000001-*/entropy/c/0", "--set draws-5_entropy --shard 1", "--top-k 0 --draws"),
    ],
)
def test_the_lines_that_verify_prints_mend_the_damaged_set_and_leave_the_other(
    flip_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, words: str, options: str
) -> None:
    root = tmp_path / "c"
    copytree(flip_cache, root)
    before = Cache.open(root).targets("one", "a")
    everything = before.read(0, before.corpus.num_positions)
    damage(root, f"targets/one/a/{place}")
    assert run("verify", root) == 1
    told = capsys.readouterr().out.splitlines()
    lines = [line.strip() for line in told if line.startswith("  potstill ")]
    assert len(lines) == 2, told
    assert lines[0] == f"potstill delete {root} --teacher one --corpus a {words}"
    assert lines[1].startswith(f"potstill prefill --cache {root} --corpus a --teacher one=MODEL_OR_URL {options}")
    assert run(*shlex.split(lines[0])[1:], "--yes") == 0
    with serving_teachers(hosted("one", teacher_for(before.corpus, model="fake-one"))) as url:
        assert run(*shlex.split(lines[1].replace("MODEL_OR_URL", f"{url}#one"))[1:]) == 0
    assert run("verify", root) == 0
    assert_same(Cache.open(root).targets("one", "a").read(0, before.corpus.num_positions), everything)


def test_of_damage_that_all_shards_share_no_shard_is_to_be_deleted(
    flip_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copytree(flip_cache, tmp_path / "c")
    (tmp_path / "c" / "targets" / "one" / "b" / "ranks.json").unlink()
    assert run("verify", tmp_path / "c") == 1
    told = capsys.readouterr().out
    assert "potstill delete" not in told
    assert "see `What to do about damage` in cache/FORMAT.md" in told


class FailingRoot(Root):
    """A store that does not give the bytes of one shard's entropy."""

    def sha256(self, path: str) -> str:
        if "segments/000001-" in path and "entropy/c" in path:
            raise StoreError(f"{path}: Input/output error")
        return super().sha256(path)


def test_a_shard_that_cannot_be_read_now_is_told_but_not_to_be_deleted(two_sets: Cache) -> None:
    found = [each for each in check_cache(FailingRoot.open(two_sets.root.url)) if each.problems or each.unreachable]
    assert len(found) == 1
    assert "Input/output error" in found[0].unreachable
    assert found[0].problems == ()
    assert found[0].refill == ""


@pytest.mark.parametrize(
    ("fields", "encoding", "words"),
    [
        (Fields(k=64), "u8", "--top-k 64"),
        (Fields(k=0, draws=50, entropy=True, temperatures=(2.0, 4.0)), "u8", "--draws 50 --entropy --temperatures 2,4"),
        (Fields(k=8, draws=2, seed=7, temperatures=(0.1,), dense=True), "f32", "--seed 7 --temperatures 0.1 --dense"),
    ],
)
def test_the_options_that_are_told_mean_the_fields_of_the_set(fields: Fields, encoding: str, words: str) -> None:
    told = SetSpec(identity=fake_identity(), fields=fields, encoding=encoding_by_name(encoding)).fill_options
    parser = argparse.ArgumentParser()
    add_field_options(parser)
    parsed = parser.parse_args(told.split())
    assert (fields_of(parsed), parsed.encoding) == (fields, encoding)
    assert words in told


def test_who_reads_or_exports_what_a_set_lacks_is_told_the_prefill_that_fills_it(
    two_sets: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = two_sets.targets("fake", "docs")
    way_out = "run `potstill prefill` or `fill` with --top-k 0 --draws 5 --seed 3 --entropy"
    end = targets.corpus.num_positions
    with pytest.raises(NotCommitted, match=f"sets/draws-5_entropy yet; {way_out}$"):
        targets.read(end - 1, end)
    told = refused(
        capsys, "export", two_sets.root.url, "--corpus", "docs", "--teacher", "fake", "--to", tmp_path / "files"
    )
    assert "run `potstill prefill` or `fill` with --top-k 0 --draws 5 --seed 3 --entropy, or take --shards" in told


def test_what_is_kept_otherwise_needs_another_teacher_name_and_what_is_not_kept_can_be_added(two_sets: Cache) -> None:
    targets = two_sets.targets("fake", "docs")
    for fields, names in (
        (Fields(k=7), "k"),
        (Fields(k=0, draws=6, seed=3), "draws"),
        (Fields(k=7, draws=5, seed=4, dense=True), "k and draws"),
    ):
        with pytest.raises(UnsupportedField, match=f"fill under another teacher name: {names} cannot be changed$"):
            targets.read(0, 3, fields=fields)
    for added in (Fields(k=3, dense=True), Fields(k=3, temperatures=(2.0,))):
        with pytest.raises(UnsupportedField, match="or add it with `potstill prefill` or `fill`$"):
            targets.read(0, 3, fields=added)


def test_damage_that_a_reader_meets_leads_to_verify_which_says_so_only_once(
    two_sets: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(two_sets.root.url)
    damage(root, "targets/fake/docs/segments/000000-*/log_tail/c/0")
    targets = Cache.open(root).targets("fake", "docs")
    way_out = "; `potstill verify` of its cache tells what else is damaged and how to mend it"
    for read in (
        lambda: targets.read(0, 3),
        lambda: targets.read_rows([0]),
        lambda: targets.read_column("log_tail", 0, 3),
    ):
        with pytest.raises(CorruptSegment) as damaged:
            read()
        assert damaged.value.detail.endswith(way_out)
        assert damaged.value.detail.count("potstill verify") == 1
    assert run("verify", root, "--decode") == 1
    assert "potstill verify" not in capsys.readouterr().out


def test_verify_of_a_place_without_a_cache_does_not_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.txt").write_text("no cache")
    assert run("verify", tmp_path) == 1
    assert f"there is nothing to check in {tmp_path}" in capsys.readouterr().out
    assert run("verify", tmp_path, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"ok": False, "shards_checked": 0, "corrupt": []}


@pytest.mark.parametrize("shard", [99, -1])
def test_deleting_a_shard_that_cannot_be_says_which_there_are(
    two_sets: Cache, capsys: pytest.CaptureFixture[str], shard: int
) -> None:
    last = two_sets.corpus("docs").num_shards - 1
    words = ["delete", two_sets.root.url, "--teacher", "fake", "--corpus", "docs", "--shard", shard, "--yes"]
    assert f"there is no shard {shard} of corpus 'docs'; it has shards 0 to {last}" in refused(capsys, *words)


def test_a_shard_that_a_job_is_filling_is_left_alone_and_the_others_are_not(
    two_sets: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    from potstill.cache.store.claims import Claims

    root, path = two_sets.root.url, "targets/fake/docs/sets/draws-5_entropy"
    delete = ["delete", root, "--teacher", "fake", "--corpus", "docs", "--set", "first", "--yes", "--shard"]
    with Claims(two_sets.root, f"{path}/claims") as claims:
        assert claims.take("000001") is not None
        told = refused(capsys, *delete, 0, 1)
        assert f"a job seems to be filling shard 1 of {path}; stop it and wait until its claims" in told
        assert run(*delete, 0) == 0
        (claim,) = (Path(root) / path / "claims").iterdir()
        os.utime(claim, (time.time() - 121, time.time() - 121))
        assert run(*delete, 1) == 0


def test_a_file_in_place_of_a_cache_is_called_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("once upon a time")
    words = ["ingest", book, "--cache", book, "--corpus", "docs", "--tokenizer", tmp_path]
    make_corpus(tmp_path / "c")[1].tokenizer.save(str(tmp_path / "tokenizer.json"))
    for told in (refused(capsys, *words), refused(capsys, "inspect", book)):
        assert told == f"invalid_input: no cache at {str(book)!r}: it is a file, not a folder"
