"""Runs on several corpora, with corpora to evaluate on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.edges.e18_held_out_documents import shared_rows
from benchmarks.edges.e19_mixture import mixed, resumed_is_straight, rows_drawn
from potstill.cache.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.errors import InvalidInput, NotFound, SpecMismatch, TeacherFailed, UnknownTeacher
from potstill.cache.store.root import Root
from potstill.clients.cli import main
from potstill.student_trainer.checkpoint.folders import newest_checkpoint
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.sources import cache_source
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import evaluate_run, open_run
from tests.support.tiny_runs import config_of, fill, unhashed, word_tokenizer, write_cache

WEIGHT = r"^data\.corpora\.0\.weight is {}: must be a number of 0 or more, or \[step, weight\] pairs whose steps rise$"

pytestmark = pytest.mark.usefixtures("one_torch_thread")
_JUDGES = ["judge", "bare"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    write_cache(folder, documents=60)
    write_cache(folder, documents=20, corpus="more", seed=1)
    write_cache(folder, documents=4, corpus="judge", seed=2)
    write_cache(folder, documents=4, corpus="bare", seed=3, teachers=())
    return folder


def test_two_corpora_are_drawn_in_their_shares(folder: Path) -> None:
    config = mixed(folder, "drawn")
    with open_run(config) as run:
        epoch = sum(order.rows_per_epoch for order in run.order.orders)
    for count in (epoch // 8 * 8, 4000):
        drawn, same = rows_drawn(config, count)
        assert abs(drawn[0] - 0.8 * count) <= 2, "far within the sampling error of independent draws"
        assert same, "on 1, 2 and 3 workers"


def test_a_resumed_mixture_is_bit_for_bit_the_straight_one(folder: Path) -> None:
    assert resumed_is_straight(folder)
    records = [each for each in read_metrics(folder / "straight") if "loss" in each]
    assert records[-1]["epoch"] == {"docs": 0, "more": 0}


def test_what_models_wrote_is_drawn_early_and_its_prompts_are_not_learnt(tmp_path: Path) -> None:
    root = write_cache(tmp_path, documents=60)
    answers = [
        {"prompt": f"w{n % 40} w2", "completion": f"w{n % 30} w4 w5", "model": "gpt-4", "created": 1717171717}
        for n in range(40)
    ]
    source = tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in answers))
    plan = IngestPlan(completions="context", row_tokens=16, shard_positions=100)
    ingest(Root.open(root), "answers", [source], word_tokenizer(), plan)
    fill(root, "fake", "answers")
    corpora = [{"name": "docs", "weight": 1.0}, {"name": "answers", "weight": [[0, 3.0], [5, 0.0]]}]
    config = config_of(root, tmp_path / "run", data={"corpus": None, "corpora": corpora, "held_out": 4})
    with open_run(config) as run:
        drawn = run.order.take(0, 80).reshape(10, 8) >= run.corpora.first_rows[1]
        own = run.reader.measure(run.corpora.first_rows[1] + np.arange(4))
    assert drawn.sum(axis=1)[0] == 6
    assert drawn.sum(axis=1)[5:].tolist() == [0] * 5
    assert own.num_labels == 3 * 4, "of five tokens a row, the completion's three"
    train(config)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 10


def test_batches_are_the_rows_and_targets_of_their_corpora(folder: Path) -> None:
    cache = Cache.open(folder / "cache")
    with open_run(mixed(folder, "x")) as run:
        first = int(run.corpora.first_rows[1])
        batch = run.reader.read([first + 3, 5, first])
        for i, (name, row) in enumerate((("more", 3), ("docs", 5), ("more", 0))):
            tokens = cache.corpus(name).row(row)
            (targets,) = cache.targets("fake", name).read_rows([row])
            assert batch.tokens[i, : len(tokens)].tolist() == tokens.tolist()
            np.testing.assert_array_equal(batch.teachers[0].logprobs[i, : len(tokens)], targets.logprobs)
        counts = run.reader.measure(np.array([first + 3, 5, first]))
        assert (counts.num_labels, counts.num_positions) == (batch.num_labels, batch.num_positions)
        assert counts.lengths.tolist() == batch.lengths.tolist()


def test_answers_for_more_rows_than_one_corpus_was_asked_for_are_not_taken_for_anothers(folder: Path) -> None:
    cache = Cache.open(folder / "cache")
    corpora = JoinedCorpora((cache.corpus("docs"), cache.corpus("more")))
    docs, more = (cache_source("fake", cache.targets("fake", name)) for name in ("docs", "more"))
    twice = replace(docs, read=lambda rows, tokens: docs.read([*rows, *rows], [*tokens, *tokens]))
    reader = BatchReader(corpora, (corpora.source([twice, more]),), (1.0,))
    with pytest.raises(TeacherFailed, match="2 rows of corpus 'docs' got 4 answers"):
        reader.read([0, 1, len(corpora) - 2, len(corpora) - 1])


def test_corpora_to_evaluate_on_are_measured_with_the_held_out_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mixed(folder, "judged", eval_corpora=_JUDGES, held_out=4)
    result = train(config)
    records = [each for each in read_metrics(folder / "judged") if "loss" not in each]
    assert [each["step"] for each in records] == [0, 5, 10]
    assert records[0]["held_out"]["documents"] > 1
    assert records[0]["held_out"]["rows"] == 8, "four of each corpus"
    assert set(records[-1]["evaluations"]) == {"judge", "bare"}
    assert records[-1]["evaluations"]["judge"]["documents"] == 4
    assert set(records[-1]["evaluations"]["judge"]["teachers"]) == {"fake"}
    assert records[-1]["evaluations"]["bare"]["teachers"] == {}, "no targets, so the cross-entropy only"
    summary = json.loads((folder / "judged" / "summary.json").read_text())
    assert summary["evaluations"] == records[-1]["evaluations"]
    assert train(config) == result, "found finished"
    assert main(["evaluate", str(folder / "judged"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held_out"]["loss"]["value"] == pytest.approx(summary["held_out"]["ce"], rel=1e-5)
    assert set(found["by_source"]) == {"docs", "more"}, "of a mixture, its corpora"
    assert {name: each["loss"]["value"] for name, each in found["corpora"].items()} == pytest.approx(
        {name: each["ce"] for name, each in summary["evaluations"].items()}, rel=1e-5
    )


def test_a_run_without_held_out_rows_is_evaluated_on_other_corpora(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = {"held_out": 0, "eval_corpora": ["judge"]}
    result = train(config_of(folder / "cache", run, data=data, train={"steps": 1}))
    assert evaluate_run(run) == result.evaluations
    assert set(result.evaluations) == {"judge"}
    train(config_of(folder / "cache", tmp_path / "none", data={"held_out": 0}, train={"steps": 1}))
    with pytest.raises(InvalidInput, match=r"held_out is 0, and it has no data\.eval_corpora"):
        evaluate_run(tmp_path / "none")


def test_rows_of_a_corpus_to_evaluate_on_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    write_cache(tmp_path, documents=60)
    write_cache(tmp_path, documents=10, corpus="part")  # the first documents again
    with open_run(
        config_of(tmp_path / "cache", tmp_path / "run", data={"eval_corpora": ["part"], "held_out": 0})
    ) as run:
        (docs,) = run.corpora.corpora
        part = Cache.open(tmp_path / "cache").corpus("part")
        keys = {part.row(i).tobytes() for i in range(len(part))}
        trained_on = {docs.row(int(i)).tobytes() for i in run.order.take(0, len(docs))}
        assert keys
        assert not keys & trained_on


def test_a_changed_mixture_is_another_run(folder: Path, tmp_path: Path) -> None:
    config = mixed(folder, str(tmp_path / "run"))
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})}))
    other = config.model_dump(mode="json")
    other["data"]["corpora"][1]["weight"] = 0.3
    with pytest.raises(SpecMismatch, match=r"data\.corpora\.1\.weight is 0\.3, but"):
        train(type(config).of(other))


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        ({"corpora": [{"name": "docs"}, {"name": "docs"}]}, InvalidInput, "different names"),
        ({"corpora": [{"name": "docs"}], "corpus": "docs"}, InvalidInput, "exactly one of corpus and corpora"),
        ({"corpora": [{"name": "docs", "weight": 0}]}, InvalidInput, "weight is never over 0"),
        ({"corpora": [{"name": "docs", "weight": [[5, 1], [5, 2]]}]}, InvalidInput, "whose steps rise"),
        ({"corpora": [{"name": "docs", "weight": [[0, 1], [9, 0]]}]}, InvalidInput, "all corpora are 0 at step 9"),
        ({"corpora": [{"name": "docs", "weight": [0, 0.8]}]}, InvalidInput, WEIGHT.format(r"\[0, 0\.8\]")),
        ({"corpora": [{"name": "docs", "weight": "half"}]}, InvalidInput, WEIGHT.format("'half'")),
        ({"corpora": [{"name": "docs", "weight": -1}]}, InvalidInput, WEIGHT.format("-1")),
        ({"corpora": [{"name": "docs", "wieght": 1}]}, InvalidInput, "wieght is unknown; known are name, weight, held"),
        ({"corpora": [{"name": "docs", "held_out": 1.5}]}, InvalidInput, "whole number of rows"),
        ({"eval_corpora": ["docs"]}, InvalidInput, "different names"),
        ({"eval_corpora": ["nothing"]}, NotFound, "nothing"),
        ({"corpora": [{"name": "docs"}, {"name": "bare"}]}, UnknownTeacher, "bare"),
    ],
)
def test_a_mixture_that_cannot_be(
    folder: Path, tmp_path: Path, data: dict[str, object], error: type, told: str
) -> None:
    with pytest.raises(error, match=told):
        train(mixed(folder, str(tmp_path / "run"), **data))


def test_a_corpus_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
    from tests.support.corpora import byte_tokenizer

    rows = [np.arange(1, 9, dtype=np.uint32)]
    cache = Cache.open(folder / "cache", "r+")
    if "bytes" not in cache.corpora():
        ingest_rows(cache.root, "bytes", rows, byte_tokenizer(), IngestPlan(row_tokens=9))
    with pytest.raises(SpecMismatch, match="corpus 'bytes' has tokenizer .*; a student learns one tokenizer"):
        train(mixed(folder, str(tmp_path / "run"), eval_corpora=["bytes"]))


def test_no_held_out_row_shares_a_document_with_training(tmp_path: Path) -> None:
    held_out, shared = shared_rows(tmp_path)
    assert held_out > 30
    assert shared == 0


def test_a_run_with_rows_held_out_one_by_one_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    """As an earlier version left it: its checkpoints do not say what was left out."""
    config = config_of(folder / "cache", tmp_path / "run", train={"steps": 1})
    train(config)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    unhashed(checkpoint, left_out=None, prefix_ids=None)
    told = "started with other held-out rows: earlier versions drew rows, now whole documents"
    with pytest.raises(SpecMismatch, match=told):
        train(config_of(folder / "cache", tmp_path / "run", train={"steps": 2}))
    with pytest.raises(SpecMismatch, match=told):
        evaluate_run(tmp_path / "run")
