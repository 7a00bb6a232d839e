"""`verify`: whatever is done to a cache is told, what is intact is not, and a live teacher shows drift."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from benchmarks.bench_flips import Patient, damages
from potstill.cache import Cache, Fields
from potstill.cache.errors import CorruptSegment, InvalidInput, SpecMismatch, StoreError
from potstill.cache.store.root import Root
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.types import Targets, Tokens
from potstill.cache.upkeep.drift import check_same_vocabulary, measure_drift, sample_rows
from potstill.cache.upkeep.integrity import check_cache, count_checks
from potstill.clients.cli import main
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers


@pytest.fixture(scope="module")
def patient(flip_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Patient:
    root = tmp_path_factory.mktemp("flips") / "c"
    copytree(flip_cache, root)
    return Patient(root)


@pytest.mark.parametrize("number", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_every_kind_of_fault_is_told_and_nothing_wrong_is_read(patient: Patient, number: int) -> None:
    """So many of the faults that `benchmarks.bench_flips` puts in."""
    choose = random.Random(7)
    faults = damages(patient.objects, 60, choose)
    sorts = {(fault.name, fault.kind): fault for fault in choose.sample(faults, len(faults))}
    some = choose.sample(sorted(sorts), number)
    problems = [line for sort in some for line in patient.examine(sorts[sort], "stock").problems]
    assert problems == []


@pytest.mark.parametrize(
    ("decode", "jobs"),
    [
        (False, 1),
        (True, 3),
        pytest.param(False, 3, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
def test_an_intact_cache_is_found_so_with_and_without_decoding(
    flip_cache: Path, tmp_path: Path, decode: bool, jobs: int
) -> None:
    copytree(flip_cache, tmp_path / "c")
    root = Root.open(tmp_path / "c")
    checked = list(check_cache(root, decode=decode, jobs=jobs))
    assert [each.problems for each in checked] == [()] * count_checks(root)


def test_the_command_names_what_is_damaged_and_the_way_out(
    flip_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copytree(flip_cache, tmp_path / "c")
    assert main(["verify", str(tmp_path / "c"), "--decode"]) == 0
    assert "0 corrupt objects" in capsys.readouterr().out
    (chunk,) = (tmp_path / "c" / "targets" / "one" / "b" / "segments").glob("000001-*/ids/c/0/0")
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert main(["verify", str(tmp_path / "c")]) == 1
    told = capsys.readouterr().out
    assert f"corrupt: {chunk.relative_to(tmp_path / 'c')} has sha256 " in told
    assert f"  potstill delete {tmp_path / 'c'} --teacher one --corpus b --set first --shard 1\n" in told
    assert main(["verify", str(tmp_path / "c"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"ok", "shards_checked", "corrupt"}
    assert not found["ok"]
    assert len(found["corrupt"]) == 1


class Outage(Root):
    """A store that does not answer for paths with `hidden` in them."""

    hidden = ""

    def get(self, path: str) -> bytes | None:
        self._answer(path)
        return super().get(path)

    def sha256(self, path: str) -> str:
        self._answer(path)
        return super().sha256(path)

    def _answer(self, path: str) -> None:
        if self.hidden in path:
            raise StoreError(f"{path}: the store does not answer")


@pytest.mark.parametrize("hidden", ["targets/one/b/manifest.json", "/ids/c/", "corpora/a/zarr.json", "journal/"])
def test_what_the_store_does_not_give_is_unreachable_and_not_corrupt(flip_cache: Path, hidden: str) -> None:
    root = Outage.open(flip_cache)
    root.hidden = hidden
    checked = list(check_cache(root))
    told = [each.unreachable for each in checked if each.unreachable]
    assert told
    assert all(hidden in line and line.endswith("the store does not answer") for line in told)
    assert not any(each.problems or each.refill for each in checked)


def test_the_command_tells_unreachable_from_corrupt(
    flip_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket in place of a seal cannot be opened, as a file on a failing disk."""
    copytree(flip_cache, tmp_path / "c")
    monkeypatch.chdir(tmp_path / "c/corpora/b")
    Path("zarr.json").unlink()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind("zarr.json")
    assert main(["verify", str(tmp_path / "c")]) == 1
    told = capsys.readouterr().out
    assert "unreachable: corpora/b: corpora/b/zarr.json: " in told or "unreachable: corpora/b/zarr.json: " in told
    assert "corrupt: " not in told
    assert ", 0 corrupt objects, " in told
    assert "not checked, as the store did not give it" in told
    assert main(["verify", str(tmp_path / "c"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["corrupt"]) == (False, [])
    assert any("corpora/b/zarr.json" in line for line in found["unreachable"])


def test_a_commit_that_the_manifest_has_otherwise_is_told(flip_cache: Path, tmp_path: Path) -> None:
    copytree(flip_cache, tmp_path / "c")
    commits = tmp_path / "c" / "targets" / "two" / "b" / "commits"
    (commits / "000000.json").unlink()
    (commits / "0.json").write_bytes(b"{}")
    told = [line for checked in check_cache(Root.open(tmp_path / "c")) for line in checked.problems]
    assert "targets/two/b/commits/000000.json is not the commit that the manifest has" in told
    assert "targets/two/b/commits/0.json is of no shard of the corpus" in told


@pytest.mark.parametrize("records", ["two/a", "one/b"])
def test_a_lost_rank_table_is_told(flip_cache: Path, tmp_path: Path, records: str) -> None:
    copytree(flip_cache, tmp_path / "c")
    record = tmp_path / "c" / "targets" / records / "ranks.json"
    record.unlink()
    problems = [line for each in check_cache(Root.open(tmp_path / "c")) for line in each.problems]
    assert problems
    assert all(f"targets/{records}/ranks.json is missing" in line for line in problems)


def test_a_stopped_verify_says_what_it_had_looked_at(flip_cache: Path, tmp_path: Path) -> None:
    """A pipe in place of a seal holds the command at a known place until it was interrupted."""
    copytree(flip_cache, tmp_path / "c")
    seal = tmp_path / "c" / "corpora" / "b" / "zarr.json"
    seal.unlink()
    os.mkfifo(seal)
    command = [sys.executable, "-m", "potstill.clients.cli", "verify", str(tmp_path / "c"), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pipe = os.open(seal, os.O_WRONLY)
    process.send_signal(signal.SIGINT)
    os.close(pipe)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    # The empty seal itself is damage, if it was still looked at.
    assert re.search(r"stopped: 0 shards and [34] other groups checked, [01] corrupt objects?; about 2[67] groups", out)


class DriftedTeacher(FakeTeacher):
    """The same model after something was changed: each logit is off by up to `nats`."""

    nats = 0.0

    def dense_logprobs(self, row: Tokens) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        exact = super().dense_logprobs(row)
        moved = exact + self.nats * np.cos(np.arange(exact.shape[1]))
        logprobs: np.ndarray[tuple[int, int], np.dtype[np.float64]] = moved - np.logaddexp.reduce(
            moved, axis=1, keepdims=True
        )
        return logprobs


@pytest.fixture(scope="module", params=["u8", "f16", "f32"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TargetSet:
    """Not to be changed."""
    cache, corpus = make_corpus(tmp_path_factory.mktemp("filled") / "c")
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher, encoding=request.param)
    for shard in range(corpus.num_shards - 1):
        first, last = corpus.shard_rows[shard : shard + 2].tolist()
        exact = asyncio.run(teacher.score(corpus.rows(first, last), Fields(k=16)))
        targets.write_shard(shard, Targets.concat(exact), teacher.provenance)
    return targets


def test_the_same_teacher_has_drifted_by_no_more_than_the_encoding(filled: TargetSet) -> None:
    rows = sample_rows(filled, 6, seed=1)
    drift = asyncio.run(measure_drift(teacher_for(filled.corpus), filled, rows))
    assert (drift.rows, drift.positions) == (6, sum(len(filled.corpus.row(row)) for row in rows))
    assert drift.same_ids == 1.0
    assert drift.max_abs <= drift.bound + 1e-6
    assert 0 <= drift.mean_kl < 1e-3
    assert drift.within(1e-6)


def test_a_changed_teacher_is_found_out_and_measured(filled: TargetSet) -> None:
    teacher = DriftedTeacher(teacher_for(filled.corpus).identity)
    teacher.nats = 0.25
    rows = sample_rows(filled, 6, seed=1)
    drift = asyncio.run(measure_drift(teacher, filled, rows))
    stored, exact = filled.read_rows(rows), [teacher.dense_logprobs(filled.corpus.row(row)) for row in rows]
    differences = [
        np.abs(ours.logprobs - np.take_along_axis(theirs, ours.ids.astype(np.int64), axis=1))
        for ours, theirs in zip(stored, exact, strict=True)
    ]
    assert drift.max_abs <= max(part.max() for part in differences) + 1e-5
    assert 0.2 < drift.max_abs < 0.25 * 2 + drift.bound
    assert 0.001 < drift.mean_kl < 0.1
    assert not drift.within(0.02)


def test_a_teacher_that_keeps_other_ids_is_found_out(filled: TargetSet) -> None:
    """Missing ids count by how far they are above the cut, as ids that are not shared have no difference."""

    class Other(FakeTeacher):
        def dense_logprobs(self, row: Tokens) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
            return super().dense_logprobs(row)[:, ::-1]

    drift = asyncio.run(measure_drift(Other(teacher_for(filled.corpus).identity), filled, sample_rows(filled, 4, 0)))
    assert drift.same_ids < 0.5
    assert not drift.within(0.1)


def test_a_sample_is_of_committed_rows_and_the_same_for_a_seed(filled: TargetSet) -> None:
    end = int(filled.corpus.shard_rows[-2])
    rows = sample_rows(filled, 5, seed=3)
    assert rows == sample_rows(filled, 5, seed=3) == sorted(set(rows))
    assert rows != sample_rows(filled, 5, seed=4)
    assert sample_rows(filled, 10**6, seed=3) == list(range(end))
    with pytest.raises(InvalidInput, match="--sample is 0"):
        sample_rows(filled, 0, seed=3)


def test_another_vocabulary_is_refused_and_other_differences_are_shown(filled: TargetSet) -> None:
    ours = filled.identity
    assert check_same_vocabulary(ours, replace(ours, dtype="bfloat16")) == "dtype: 'float32' != 'bfloat16'"
    with pytest.raises(SpecMismatch, match="have tokenizer_sha256 .* their ids do not mean the same"):
        check_same_vocabulary(ours, replace(ours, tokenizer_sha256="1" * 64))
    with pytest.raises(SpecMismatch, match="vocab_size"):
        check_same_vocabulary(ours, replace(ours, vocab_size=7))


@pytest.fixture
def url(filled: TargetSet) -> Iterator[str]:
    identity = teacher_for(filled.corpus).identity
    same, other = FakeTeacher(replace(identity, dtype="bfloat16")), DriftedTeacher(identity)
    other.nats = 0.5
    strange = FakeTeacher(replace(identity, tokenizer_sha256="1" * 64))
    teachers = {"same": same, "other": other, "strange": strange}
    with serving_teachers(*(hosted(name, teacher) for name, teacher in teachers.items())) as url:
        yield url


def test_verify_against_a_live_service(filled: TargetSet, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = filled.root.url
    assert main(["verify", root, "--live", f"fake={url}#same", "--sample", "5"]) == 0
    captured = capsys.readouterr()
    assert "fake on docs: 5 rows" in captured.out
    assert f"within the bound of {filled.encoding.name}" in captured.out
    assert "stored != live: dtype: 'float32' != 'bfloat16'" in captured.err
    assert main(["verify", root, "--live", f"fake={url}#other", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert found["corrupt"] == []
    assert found["drift"]["fake"]["docs"]["max_abs"] > 0.3
    assert main(["verify", root, "--live", f"fake={url}#strange"]) == 1
    assert capsys.readouterr().err.startswith("spec_mismatch: ")
    assert main(["verify", root, "--live", "nobody=x"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("unknown_teacher: teacher 'nobody' has no targets in")
    assert told.endswith("there are those of: fake\n")


def test_a_damaged_row_of_the_sample_is_told(filled: TargetSet, url: str, tmp_path: Path) -> None:
    copytree(filled.root.url, tmp_path / "c")
    for chunk in (tmp_path / "c").glob("targets/fake/docs/segments/*/ids/c/0/0"):
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptSegment):
        Cache.open(tmp_path / "c").targets("fake", "docs").read_rows(sample_rows(filled, 1, 0))
    assert main(["verify", str(tmp_path / "c"), "--live", f"fake={url}#same"]) == 1


@pytest.mark.slow
def test_a_real_engine_answers_what_it_answered_before(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from potstill.cache.corpus.ingest import IngestPlan, ingest
    from potstill.cache.corpus.tokenizer import load_tokenizer

    (tmp_path / "a.txt").write_text("A teacher is asked again for what it said before. " * 40)
    store = Root.open(tmp_path / "c", create=True)
    ingest(store, "docs", [tmp_path / "a.txt"], load_tokenizer(tiny_llama), IngestPlan(row_tokens=64))
    root = str(tmp_path / "c")
    assert main(["prefill", "--cache", root, "--corpus", "docs", "--teacher", f"tiny={tiny_llama}"]) == 0
    capsys.readouterr()
    assert main(["verify", root, "--live", f"tiny={tiny_llama}", "--json"]) == 0
    drift = json.loads(capsys.readouterr().out.partition("{")[2].join(("{", "")))["drift"]["tiny"]["docs"]
    assert drift["same_ids"] > 0.99
    assert drift["max_abs"] <= drift["bound"] + 0.02
