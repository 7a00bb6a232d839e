"""The commands as a person types them: each bad input gets one line, a non-zero status, and an untouched cache."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.clients.cli import main
from tests.support.command_line import refused
from tests.support.corpora import VOCAB, byte_tokenizer, make_corpus, teacher_for
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.forked import Forked
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.waiting import until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "c")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "c"


@pytest.fixture
def url(root: Path) -> Iterator[str]:
    """One service: a teacher that fits, one of another tokenizer, one of a small vocabulary, one of short rows."""
    corpus = Cache.open(root).corpus("docs")
    small = FakeTeacher(fake_identity(vocab_size=20, tokenizer_sha256=corpus.tokenizer_sha256))
    teachers = {"good": teacher_for(corpus), "stranger": FakeTeacher(fake_identity(vocab_size=VOCAB)), "small": small}
    with serving_teachers(*(hosted(name, teacher) for name, teacher in teachers.items())) as url:
        yield url


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_ingest_prefill_inspect_and_verify_in_a_row(
    tmp_path: Path, url: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a text of its own " * 30)
    ingest = ["ingest", tmp_path / "a.txt", "--cache", root, "--corpus", "own", "--tokenizer", tmp_path]
    assert main([str(a) for a in [*ingest, "--row-tokens", 64, "--shard-positions", 128]]) == 0
    assert "540 positions in 9 rows and 5 shards" in capsys.readouterr().out
    prefill = ["prefill", "--cache", root, "--corpus", "own", "--teacher", f"big={url}#good", "--top-k", 8]
    assert main([str(a) for a in prefill]) == 0
    assert "big: 5 of 5 shards committed (0 before)" in capsys.readouterr().out
    assert main([str(a) for a in prefill]) == 0
    assert "(5 before)" in capsys.readouterr().out
    assert main(["inspect", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    about = found["targets"]["big"]["own"]
    assert found["corpora"]["own"]["positions"] == 540
    assert (about["shards_committed"], about["shards"], about["fields"]["k"]) == (5, 5, 8)
    assert about["bytes"] == pytest.approx(about["bytes_per_position"] * 540)
    assert about["measured_error"]["max_abs"] <= about["encoding"]["max_abs_error"]
    assert main(["inspect", str(root)]) == 0
    assert "bytes/position" in capsys.readouterr().out
    assert main(["verify", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "shards_checked": 5, "corrupt": []}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--corpus", "none", "--teacher", "t={url}#good"], "unknown_corpus: no corpus 'none'"),
        (["--corpus", "docs", "--teacher", "t"], "invalid_input: --teacher 't': write NAME=MODEL_OR_URL"),
        (["--corpus", "docs", "--teacher", "../t={url}#good"], "invalid_input: teacher name '../t' cannot be used"),
        (["--corpus", "docs", "--teacher", "t=ftp://x"], "invalid_input: no teacher for 'ftp://x': scheme 'ftp'"),
        (["--corpus", "docs", "--teacher", "t=/no/model"], "invalid_input: there is no model folder '/no/model'"),
        (["--corpus", "docs", "--teacher", "t={url}#who"], "unknown_teacher: "),
        (["--corpus", "docs", "--teacher", "t={url}#stranger"], "spec_mismatch: teacher 't' has tokenizer 0000000"),
        (["--corpus", "docs", "--teacher", "t={url}#small", "--top-k", "8"], "spec_mismatch: corpus 'docs' has token"),
        (["--corpus", "docs", "--teacher", "t={url}#good", "--top-k", "300"], "limit_exceeded: k=300 is over"),
        (["--corpus", "docs", "--teacher", "t={url}#good", "--top-k", "0"], "invalid_input: fields ask for nothing"),
        (["--corpus", "docs", "--teacher", "t={url}#good", "--encoding", "u4"], "invalid_input: encoding 'u4'"),
        (["--corpus", "docs", "--teacher", "t={url}#good", "--batch-tokens", "0"], "invalid_input: --batch-tokens"),
    ],
)
def test_a_prefill_that_cannot_be_leaves_the_cache_as_it_was(
    root: Path, url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    before = files(root)
    full = ["prefill", "--cache", str(root), *(argument.format(url=url) for argument in arguments)]
    assert refused(capsys, *full).startswith(line)
    assert files(root) == before


@pytest.mark.slow
def test_a_row_over_the_context_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real engine says how long a row it reads."""
    from potstill.cache.corpus.ingest import IngestPlan, ingest
    from potstill.cache.corpus.tokenizer import load_tokenizer
    from potstill.cache.store.root import Root

    (tmp_path / "a.txt").write_text("word " * 4000)
    store = Root.open(tmp_path / "c", create=True)
    ingest(store, "docs", [tmp_path / "a.txt"], load_tokenizer(tiny_llama), IngestPlan(row_tokens=300))
    before = files(tmp_path / "c")
    line = refused(capsys, "prefill", "--cache", tmp_path / "c", "--corpus", "docs", "--teacher", f"tiny={tiny_llama}")
    assert line.startswith("limit_exceeded: corpus 'docs' has a row of 300 tokens, the teacher reads 255;")
    assert line.endswith("ingest it again with --row-tokens 255")
    assert files(tmp_path / "c") == before


def test_an_ingest_that_cannot_be_leaves_no_cache_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("text")
    tail = ["--cache", tmp_path / "c", "--corpus", "docs"]
    cases: list[tuple[list[object], str]] = [
        (["missing.txt", *tail, "--tokenizer", tmp_path], "source 'missing.txt' does not exist"),
        ([tmp_path / "empty.txt", *tail, "--tokenizer", tmp_path], "a corpus cannot be empty"),
        ([tmp_path / "a.txt", *tail, "--tokenizer", "/no/tokenizer"], "no tokenizer at '/no/tokenizer'"),
        ([tmp_path / "a.txt", *tail, "--tokenizer", tmp_path, "--row-tokens", 0], "--row-tokens is 0"),
        (
            [tmp_path / "a.txt", *tail, "--tokenizer", tmp_path, "--shard-positions", 10**20],
            "limit_exceeded: --shard-positions is 100000000000000000000; it must be at most 1099511627776",
        ),
    ]
    for arguments, words in cases:
        assert words in refused(capsys, "ingest", *arguments)
        assert not (tmp_path / "c").exists()
    (tmp_path / "c").mkdir()
    refused(capsys, "ingest", tmp_path / "empty.txt", *tail, "--tokenizer", tmp_path)
    assert (tmp_path / "c").exists(), "a folder that was there is not ours"


def test_a_cache_of_a_newer_format_is_refused_by_every_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seal = root / "corpora" / "docs" / "zarr.json"
    seal.write_text(seal.read_text().replace('"format": 3', '"format": 4'))
    for command in (
        ["gc", root],
        ["prefill", "--cache", root, "--corpus", "docs", "--teacher", "a=b"],
    ):
        line = refused(capsys, *command)
        assert line.startswith("format: ")
        assert "corpora/docs/zarr.json has format 4, this version reads up to 3" in line
    for looking in ("inspect", "verify"):
        assert main([looking, str(root)]) == 1
        told = capsys.readouterr()
        assert "corpora/docs/zarr.json has format 4, this version reads up to 3" in told.out + told.err


def test_a_prefill_stopped_by_sigterm_says_how_to_go_on(root: Path) -> None:
    corpus = Cache.open(root).corpus("docs")
    with serving_teachers(hosted("slow", teacher_for(corpus, tokens_per_second=2000))) as url:
        command = ["prefill", "--cache", str(root), "--corpus", "docs"]
        command += ["--teacher", f"t={url}#slow", "--batch-tokens", "300", "--in-flight", "1"]
        commits = root / "targets" / "t" / "docs" / "commits"
        with Forked(main, command) as process:
            until(lambda: process.returncode is not None or (commits.exists() and bool(os.listdir(commits))))
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "the same command goes on with the rest" in out
    committed = Cache.open(root).targets("t", "docs").committed
    assert 0 < committed.sum() < len(committed)
