from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.support import synthetic_targets
from potstill.cache import Cache, Fields, Targets
from potstill.cache.encoding.logprobs import ENCODINGS
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.estimate import LIKE_SPREAD, SPREAD, TABLE, Basis, Prices, Workload, estimate, measure
from potstill.clients.cli import main
from tests.support.corpora import VOCAB, make_corpus, teacher_for, topics
from tests.support.fakes import FakeTeacher

EVERYTHING = Fields(k=8, draws=20, seed=3, entropy=True, temperatures=(2.0, 4.0), dense=True)


def make_targets(root: Path, fields: Fields, encoding: str = "u8") -> TargetSet:
    """Two or three shards."""
    cache, corpus = make_corpus(root, texts=topics(2), shard_positions=600)
    teacher = teacher_for(corpus)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=fields, encoding=encoding)
    fill_all(targets, teacher)
    return targets


def fill_all(targets: TargetSet, teacher: FakeTeacher) -> None:
    corpus = targets.corpus

    def scored(rows: Any) -> Targets:
        return Targets.concat([teacher.targets(corpus.row(row), targets.fields) for row in rows])

    pilot = targets.pilot_rows()
    if pilot:
        targets.make_ranks(scored(pilot))
    for shard in range(corpus.num_shards):
        rows = range(int(corpus.shard_rows[shard]), int(corpus.shard_rows[shard + 1]))
        assert targets.write_shard(shard, scored(rows), teacher.provenance)
    targets.fold()


def workload_of(targets: TargetSet) -> Workload:
    """Exactly the targets that are there: shards of equal size, as many as there are."""
    positions, shards = targets.corpus.num_positions, targets.corpus.num_shards
    return Workload(
        positions=positions, vocab_size=VOCAB, fields=targets.fields, shard_positions=-(-positions // shards)
    )


def stored(root: Path) -> list[int]:
    return [path.stat().st_size for path in (root / "targets").rglob("*") if path.is_file()]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("fields", [Fields(k=8), EVERYTHING, Fields(k=0, draws=20), Fields(k=0, entropy=True)])
def test_objects_are_counted_as_they_are_stored(tmp_path: Path, fields: Fields, encoding: str) -> None:
    targets = make_targets(tmp_path / "c", fields, encoding)
    found = estimate(workload_of(targets), encoding, Prices())
    assert found.objects == len(stored(tmp_path / "c"))
    assert found.manifests == 1


@pytest.mark.parametrize("encoding", ["u8", "f32"])
def test_a_measured_cache_gives_its_own_bytes_and_those_of_ten_times_as_much(tmp_path: Path, encoding: str) -> None:
    targets = make_targets(tmp_path / "c", EVERYTHING, encoding)
    basis = measure(Cache.open(tmp_path / "c"), EVERYTHING)
    found = estimate(workload_of(targets), encoding, Prices(), basis)
    assert found.spread == LIKE_SPREAD
    assert found.num_bytes == pytest.approx(sum(stored(tmp_path / "c")), rel=LIKE_SPREAD)
    assert "docs of" in basis.source


@pytest.mark.parametrize("k", [12, *(pytest.param(k, marks=pytest.mark.slow) for k in (64, 100))])
def test_the_table_meets_a_real_cache_of_a_teacher_it_was_not_made_from(tmp_path: Path, k: int) -> None:
    """A synthetic teacher of another vocabulary, whose tails are about as heavy as a language model's."""
    from benchmarks.bench_size import write

    sample = synthetic_targets.make(4096, 4096)
    exact = Targets(
        ids=sample.targets.ids,
        logprobs=sample.targets.logprobs,
        log_tail=sample.targets.log_tail,
        label_logprob=sample.targets.label_logprob,
    ).prefix(k)
    targets = write(tmp_path, sample, exact, "u8", Fields(k=k))
    commit = targets.sets[0].commits.of(0)
    assert commit is not None
    wanted = Workload(positions=4096, vocab_size=4096, fields=Fields(k=k), shard_positions=4096)
    found = estimate(wanted, "u8", Prices())
    assert found.num_bytes == pytest.approx(sum(stored(tmp_path)), rel=SPREAD["u8"])


def test_a_measured_cache_scales_the_other_encodings_and_vocabularies_too(tmp_path: Path) -> None:
    make_targets(tmp_path / "c", Fields(k=8))
    basis = measure(Cache.open(tmp_path / "c"), Fields(k=16))
    wanted = Workload(positions=10**9, vocab_size=50_000, fields=Fields(k=16))
    for encoding in ENCODINGS:
        by_table, like = (estimate(wanted, encoding, Prices(), each) for each in (TABLE, basis))
        assert like.bytes_per_position / by_table.bytes_per_position == pytest.approx(basis.factor, rel=0.01)
        assert like.spread == SPREAD[encoding]


def test_more_of_anything_never_takes_less() -> None:
    def size(encoding: str, **change: Any) -> float:
        values = {"k": 64, "vocab_size": 49_152, "positions": 10**9, "draws": 0, **change}
        fields = Fields(k=values["k"], draws=values["draws"])
        wanted = Workload(positions=values["positions"], vocab_size=values["vocab_size"], fields=fields)
        return estimate(wanted, encoding, Prices()).num_bytes

    for encoding in ENCODINGS:
        for name, values in {
            "k": (1, 4, 8, 20, 32, 64, 100, 256, 300, 1000),
            "vocab_size": (300, 32_000, 49_152, 128_000, 262_144),
            "positions": (10**6, 10**9, 10**12),
            "draws": (0, 1, 10, 30, 50, 100, 1000),
        }.items():
            sizes = [
                size(encoding, **({"k": 200} if name == "vocab_size" else {}), **{name: value}) for value in values
            ]
            assert (np.diff(sizes) > 0).all(), (encoding, name, sizes)


def test_the_command_prints_every_encoding_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", "--positions", "500B", "--vocab-size", "49152", "--teachers", "3", "--json"]
    assert main([*arguments, "--price", "0.01", "--put-price", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["positions"], found["teachers"], set(found["encodings"])) == (500 * 10**9, 3, set(ENCODINGS))
    u8 = found["encodings"]["u8"]
    assert u8["num_bytes"] == pytest.approx(3 * 500e9 * u8["bytes_per_position"])
    assert u8["num_bytes_low"] < u8["num_bytes"] < u8["num_bytes_high"]
    assert u8["month"] == pytest.approx(u8["num_bytes"] / 2**30 * 0.01)
    assert u8["write"] == pytest.approx(u8["write_requests"] / 1000 * 0.1)
    assert u8["manifests"] == 3
    assert main([*arguments[:-1], "--encoding", "archive"]) == 0
    printed = capsys.readouterr().out
    assert "archive" in printed
    assert "f32" not in printed


def test_a_cache_is_measured_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_targets(tmp_path / "c", Fields(k=8))
    arguments = ["estimate", "--positions", "1M", "--top-k", "8", "--like", str(tmp_path / "c"), "--json"]
    assert main(arguments) == 0
    assert "measured on fake/docs of" in json.loads(capsys.readouterr().out)["basis"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--positions", "many"], "--positions 'many' must be a number of at least 1"),
        (["--positions", "0"], "--positions '0' must be a number of at least 1"),
        (["--positions", "nan"], "--positions 'nan' must be"),
        (["--vocab-size", "0"], "--vocab-size is 0; it must be 1 to"),
        (["--teachers", "-1"], "--teachers is -1; it must be 1 to"),
        (["--teachers", "9" * 400], "it must be 1 to 1,000,000,000,000,000,000"),
        (["--top-k", "3000", "--encoding", "archive"], "archive keeps at most 2048 entries or draws of a position"),
        (["--top-k", "500", "--vocab-size", "300"], "--top-k is 500; the vocabulary has 300 ids"),
        (["--top-k", "0"], "fields ask for nothing"),
        (["--encoding", "u4"], "encoding 'u4' is unknown"),
        (["--price", "-1"], "a price is -1.0; it must be 0 or more"),
        (["--like", "/no/cache"], "no cache at '/no/cache'"),
    ],
)
def test_what_cannot_be_estimated_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["estimate", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_temperatures_are_read_as_by_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", "--temperatures", "hot"])
    assert "argument --temperatures: 'hot' is not a list of numbers like 2,4" in capsys.readouterr().err


def test_an_encoding_that_does_not_keep_so_much_has_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--top-k", "3000", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["encodings"]) == {"u8", "f16", "f32"}


def test_a_cache_without_targets_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "c")
    assert main(["estimate", "--like", str(tmp_path / "c")]) == 1
    assert "holds no committed targets" in capsys.readouterr().err


def test_a_basis_says_how_far_off_it_may_be() -> None:
    wanted = Workload(positions=1, vocab_size=300, fields=Fields(k=8))
    exact = Basis(source="", like=("u8", Fields(k=8), 300))
    assert [TABLE.spread("u8", wanted), exact.spread("u8", wanted), exact.spread("f16", wanted)] == [
        SPREAD["u8"], LIKE_SPREAD, SPREAD["f16"],
    ]  # fmt: skip


COMPUTE = ["--teacher-parameters", "7.2B", "--teacher-parameters", "13e9", "--student-parameters", "1.43B"]


def test_gpu_time_is_two_and_six_operations_a_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    devices = ["--gpus", "64", "--gpu-flops", "312T", "--mfu", "0.5", "--gpu-hour", "2", "--passes", "1.5"]
    assert main(["estimate", "--positions", "500B", *COMPUTE, *devices, "--json"]) == 0
    *teachers, student = json.loads(capsys.readouterr().out)["compute"]["models"]
    assert [each["operations"] for each in teachers] == [2 * 7.2e9 * 5e11, 2 * 13e9 * 5e11]
    assert student["operations"] == pytest.approx(6 * 1.43e9 * 7.5e11)
    hours = 6 * 1.43e9 * 7.5e11 / 156e12 / 3600
    assert (student["device_hours"], student["cost"]) == (pytest.approx(hours), pytest.approx(2 * hours))
    assert student["days"] == pytest.approx(hours / 24 / 64)


def test_gpu_time_is_told_only_where_parameters_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate"]) == 0
    assert "GPU" not in capsys.readouterr().out
    assert main(["estimate", "--positions", "500B", *COMPUTE]) == 0
    out = capsys.readouterr().out
    assert "in all 17,196 GPU hours, 42,990 USD" in " ".join(out.split())


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--mfu", "1.2", "--mfu is 1.2; it must be over 0 and at most 1"),
        ("--gpus", "0", "--gpus is 0; it must be at least 1"),
        ("--gpu-flops", "989", "--gpu-flops is 989; it must be 1e9 to 1e18"),
        ("--gpu-hour", "-1", "--gpu-hour is -1.0; a price must be 0 or more"),
        ("--passes", "0", "--passes is 0.0; it must be over 0"),
        ("--teacher-parameters", "7x", "--teacher-parameters '7x' must be a number of at least 1"),
    ],
)
def test_bad_compute_is_one_line(option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *COMPUTE, option, value]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert told in line
