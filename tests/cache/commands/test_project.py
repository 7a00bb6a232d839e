"""`potstill project`, as it is typed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.commands import export, project, verify
from potstill.cache.errors import InvalidInput
from tests.support.command_line import InterruptedStream, run_command
from tests.support.corpora import byte_tokenizer, topics
from tests.support.tokenizers.small import of_letters, trained
from tests.support.tokenizers.two_corpora import ingested, taught, write

TEXTS = topics(3, characters=300)


def run(root: Path, *more: str, corpus: str = "students") -> int:
    parser = argparse.ArgumentParser()
    project.add_arguments(parser)
    words = ["--cache", str(root), "--corpus", corpus, "--teacher", "fake", "--from", "teachers", *more]
    return project.run(parser.parse_args(words))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    cache = Cache.open(tmp_path / "cache", mode="r+")
    source = write(tmp_path / "text", TEXTS)
    taught(cache, ingested(cache, "teachers", source, byte_tokenizer()), k=4)
    ingested(cache, "students", source, trained(topics(20), 400))
    return tmp_path / "cache"


def test_it_tells_what_aligned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table by kind of token and one line; the same as JSON; the same again where there is nothing to do."""
    assert run(root, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shards"] == {"written": 2, "before": 0, "waiting": 0}
    assert told["by_category"]["all"]["aligned"] == 1
    assert told["by_category"]["words"]["positions"] > 100
    assert run(root, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {**told, "shards": {"written": 0, "before": 2, "waiting": 0}}
    assert run(root) == 0
    table, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    assert table.splitlines()[1].startswith("all ")
    assert last == "fake: 0 shards of corpus students committed, 2 before"


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is told at the end of the last shard, before it is committed."""
    told = InterruptedStream()
    with monkeypatch.context() as at:
        at.setattr("sys.stderr", told)
        with pytest.raises(KeyboardInterrupt):
            run(root)
    kept = "1 of 2 shards of corpus students committed so far"
    assert told.getvalue() == f"fake: stopped; {kept}, the same command goes on with the rest\n"
    assert run(root) == 0
    *_, partly, last = capsys.readouterr().out.splitlines()
    assert partly.startswith("the table is of the shards that were committed now")
    assert last == "fake: 1 shard of corpus students committed, 1 before"


def test_the_table_has_a_line_a_kind(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With shares in per cent."""
    assert run(root, "--encoding", "f16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "next token"
    assert lines[1].startswith("all ")
    assert "100.0%" in lines[1]
    assert Cache.open(root).targets("fake", "students").encoding.name == "f16"


def test_a_teacher_that_says_nothing_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokenizers of which no tokens end at the same place, but for the last."""
    cache = Cache.open(tmp_path / "cache", mode="r+")
    source = write(tmp_path / "text", ["ab" * 100])
    taught(cache, ingested(cache, "teachers", source, of_letters([("b", "a")])), k=1)
    ingested(cache, "students", source, of_letters([("a", "b")]))
    assert run(tmp_path / "cache") == 0
    told = capsys.readouterr()
    assert "warning: nearly nothing aligned: 0.00% of the mass of fake is resolved" in told.err


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """A mistyped one is refused; so is an encoding that there is not."""
    with pytest.raises(InvalidInput, match="nowhere"):
        run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InvalidInput, match="encoding 'u7' is unknown"):
        run(tmp_path / "nowhere", "--encoding", "u7")


def test_verify_names_the_way_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged shard is projected again, not scored."""
    run(root)
    segment = next((root / "targets" / "fake" / "students" / "segments").rglob("c/0*"))
    file = segment if segment.is_file() else next(each for each in segment.rglob("*") if each.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    capsys.readouterr()
    assert verify.run(parser.parse_args([str(root)])) == 1
    out = capsys.readouterr().out
    assert "to project the damaged shards of targets/fake/students again:" in out
    assert f"potstill project --cache {root} --corpus students --teacher fake --from CORPUS_OF_ITS_OWN" in out


def test_distillkit_cannot_hold_them(root: Path, tmp_path: Path) -> None:
    """Its rows would tell the unresolved mass as that of other tokens; ours hold it."""
    run(root)
    words = ["--cache", root, "--corpus", "students", "--teacher", "fake", "--to", tmp_path / "out"]
    with pytest.raises(InvalidInput, match="are projected, and DistillKit's rows cannot say"):
        run_command(export, *words, "--format", "distillkit")
    assert not (tmp_path / "out").exists()
    assert run_command(export, *words) == 0
