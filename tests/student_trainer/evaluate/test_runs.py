"""`potstill evaluate RUN`: a cache elsewhere, further corpora, and a run with nothing to be judged by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.store.root import Root
from potstill.cache.types import Fields
from potstill.clients.cli import main
from potstill.student_trainer.train.loop import train
from tests.support.command_line import InterruptedStream
from tests.support.tiny_runs import VOCAB, config_of, fill, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without held-out rows, whose cache was moved."""
    folder = tmp_path_factory.mktemp("runs")
    root = write_cache(folder, documents=20)
    write_cache(folder, documents=4, corpus="other", seed=1)
    write_cache(folder, documents=5, corpus="part")  # the first documents of the run's corpus
    turned = Tokenizer(models.WordLevel({f"w{VOCAB - 1 - i}": i for i in range(VOCAB)}, unk_token="w0"))
    turned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ingest(Root.open(root), "turned", [folder / "other-source"], turned, IngestPlan(row_tokens=12))
    train(config_of(root, folder / "run", data={"held_out": 0}, train={"steps": 1, "eval_every": 1}))
    root.rename(folder / "elsewhere")
    return folder / "run"


def test_a_run_is_judged_by_a_further_corpus_in_a_cache_that_was_moved(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--cache", str(run.parent / "elsewhere"), "--corpus", "other", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "held_out" not in found
    assert found["corpora"]["other"]["documents"] == 4
    assert found["corpora"]["other"]["teachers"]["fake"]["kl"]["value"] > 0


@pytest.mark.parametrize(
    ("corpora", "told"),
    [
        ([], "no held-out rows: its data.held_out is 0, and it has no data.eval_corpora; name a corpus by --corpus"),
        (["part"], "no row of corpus 'part' is left to evaluate on: "),
        (["none"], "no corpus 'none'"),
        (["turned"], "corpus 'turned' has another tokenizer than the run's corpus 'docs': id "),
    ],
)
def test_a_run_with_nothing_to_be_judged_by(
    run: Path, capsys: pytest.CaptureFixture[str], corpora: list[str], told: str
) -> None:
    named = [word for name in corpora for word in ("--corpus", name)]
    assert main(["evaluate", str(run), "--cache", str(run.parent / "elsewhere"), *named]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert shown.err.count("\n") == 1


def test_a_folder_that_holds_runs_names_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.parent)]) == 1
    assert capsys.readouterr().err.endswith(f"no config.json, but it holds the runs {str(run)!r}: name one\n")
    config = (run / "config.json").read_text()
    for i in range(5):
        file = run.parent / "ablation" / "runs" / "ce" / str(i) / "config.json"
        file.parent.mkdir(parents=True)
        file.write_text(config)
    assert main(["evaluate", str(run.parent / "ablation")]) == 1
    assert "/ablation/runs/ce/2' and 2 more: name one" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_half_written_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", told := InterruptedStream())
    words = ["--cache", str(run.parent / "elsewhere"), "--corpus", "other", "--html", str(tmp_path / "page.html")]
    assert main(["evaluate", str(run), *words]) == 130
    assert told.getvalue() == "stopped: nothing of it is kept; the same command begins again\ninterrupted\n"
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_draws_alone_is_measured_by_its_whole_distributions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_cache(tmp_path, documents=12, teachers=())
    fill(root, "fake", fields=Fields(k=0, draws=6))
    fill(root, "fake", fields=Fields(k=0, dense=True))
    train(config_of(root, tmp_path / "run", train={"steps": 1, "eval_every": 1, "loss": "draws"}))
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--html", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["teachers"]["fake"]["kl"] is None
    assert found["teachers"]["fake"]["full_kl"]["value"] > 0
    assert any("teacher 'fake' is read as draws alone" in note for note in found["notes"])


def test_a_teacher_that_a_further_corpus_has_no_top_k_of_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_cache(tmp_path, documents=12)
    write_cache(tmp_path, documents=4, teachers=(), corpus="small", seed=1)
    fill(root, "fake", "small", fields=Fields(k=0, dense=True))
    train(config_of(root, tmp_path / "run", train={"steps": 1, "eval_every": 1}))
    assert main(["evaluate", str(tmp_path / "run"), "--corpus", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["corpora"]["small"]
    assert found["teachers"] == {}
    assert any(
        "teacher 'fake' has no top-k for corpus 'small', so it was not compared" in each for each in found["notes"]
    )
