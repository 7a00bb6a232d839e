"""`--option` of the commands that open teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.commands.teacher_options import teacher_options
from potstill.cache.errors import InvalidInput
from tests.support.command_line import refused, run
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.filled_caches import commit
from tests.support.processes.servers import hosted, serving_teachers

TWO = [("big", "path/to/big"), ("v1.5", "path/to/other")]


def test_an_option_is_of_all_teachers_or_of_the_named_one() -> None:
    texts = ["v1.5.prefix_ids=[2]", "prefix_ids=[1]", "dtype=bfloat16", "big.max_top_k=128"]
    assert teacher_options(texts, TWO) == {
        "big": {"prefix_ids": [1], "dtype": "bfloat16", "max_top_k": 128},
        "v1.5": {"prefix_ids": [2], "dtype": "bfloat16"},
    }
    assert teacher_options([], TWO) == {"big": {}, "v1.5": {}}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("dtype", "--option 'dtype': write KEY=VALUE, like max_top_k=128"),
        ("=1", "--option '=1': write KEY=VALUE"),
        ("none.dtype=half", "--option 'none.dtype=half' is of teacher 'none'; those of this command are big, far"),
        ("dtype=half", "--option 'dtype=half': teacher 'far' is a running service, http://h:1, which takes none"),
        ("far.dtype=half", "--option 'far.dtype=half': teacher 'far' is a running service"),
    ],
)
def test_an_option_that_nobody_can_take_is_refused(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        teacher_options([text], [("big", "path"), ("far", "http://me:secret@h:1")])
    assert refusal.value.detail.startswith(line)
    assert "secret" not in refusal.value.detail


def test_an_unknown_option_is_refused_before_the_engine_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(tmp_path / "c")
    (tmp_path / "model").mkdir()
    prefill = ["prefill", "--cache", tmp_path / "c", "--corpus", "docs", "--teacher", f"t={tmp_path / 'model'}"]
    line = refused(capsys, *prefill, "--option", "prefix=[1]")
    assert line.startswith("invalid_input: a vLLM teacher has no option 'prefix'; known are base, revision, dtype, ")
    assert "prefix_ids" in line
    assert refused(capsys, *prefill, "--option", "prefix_ids=[1").startswith("invalid_input: prefix_ids is '[1': ")
    assert refused(capsys, *prefill, "--option", "u.dtype=half").startswith("invalid_input: --option 'u.dtype=half' is")


def test_a_service_takes_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "c")
    command = ["--cache", tmp_path / "c", "--corpus", "docs", "--teacher", "t=http://127.0.0.1:9#t"]
    line = refused(capsys, "prefill", *command, "--option", "prefix_ids=[1]")
    assert line.startswith("invalid_input: --option 'prefix_ids=[1]': teacher 't' is a running service")
    line = refused(capsys, "verify", tmp_path / "c", "--live", "t=http://127.0.0.1:9#t", "--option", "dtype=half")
    assert "is a running service" in line
    line = refused(capsys, "verify", tmp_path / "c", "--option", "dtype=half")
    assert line == "invalid_input: --option goes with --live; without it no teacher is opened"


def test_targets_of_other_options_are_not_taken_for_those_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is there, so that no engine is needed, but not of the teacher that the options describe."""
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    commit(plan_targets(cache, teacher), teacher, range(corpus.num_shards))
    prefill = ["prefill", "--cache", tmp_path / "c", "--corpus", "docs", "--teacher", "fake=/no/model", "--top-k", 16]
    assert run(*prefill, "--option", "dtype=float32") == 0
    assert "nothing to do" in capsys.readouterr().out
    line = refused(capsys, *prefill, "--option", "prefix_ids=[1]")
    assert line == "invalid_input: there is no model folder '/no/model'"


def test_prefill_warns_of_a_doubled_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "c")
    corpus = Cache.open(tmp_path / "c").corpus("docs")
    first = int(corpus.row(0)[0])
    identity = fake_identity(vocab_size=corpus.vocab_size, tokenizer_sha256=corpus.tokenizer_sha256)
    with serving_teachers(hosted("good", FakeTeacher(replace(identity, prefix_ids=(first,))))) as url:
        prefill = ["prefill", "--cache", tmp_path / "c", "--corpus", "docs", "--top-k", 4]
        assert run(*prefill, "--teacher", f"t={url}#good") == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: t on docs: ")
    assert f"begin with [{first}] already" in line
