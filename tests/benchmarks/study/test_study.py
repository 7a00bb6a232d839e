"""A tiny study from end to end: fake teachers, a tiny model, and text that lies where packages would be unpacked."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.claims import NOT_RUN, judged
from benchmarks.study.comparing import Results
from benchmarks.study.corpora import SAMPLE, prepare_corpora
from benchmarks.study.markup import groff_text, html_text, pod_text
from benchmarks.study.plan import FEWER_DRAWS, TEACHER, Package, Plan
from benchmarks.study.results import load_results
from benchmarks.study.study import Study
from benchmarks.study.teachers import Scoring, Stopped, prepare_first, some_of
from benchmarks.study.text import prepare_text, text_sha256
from potstill.cache import Cache
from potstill.cache.corpus.tokenizer import fingerprint, load_tokenizer
from potstill.cache.errors import SpecMismatch
from potstill.cache.types import Draws, Teacher
from tests.support.corpora import topics
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.tiny_models import make_tiny_llama

TWO = replace(Plan().cell("two-by-label"), baseline="dense", large=True, layers=True)  # one run for several things
PLAN = Plan(
    packages=(Package("prose", "books", (".txt",)), Package("Python", "programs", (".txt",))),
    rows={"prose": 14, "Python": 8},
    row_tokens=24,
    held_out=12,
    specialist_rows={"Python": 4},
    specialist_steps=1,
    shard_positions=96,
    seeds=(0, 1),
    steps=2,
    batch_rows=2,
    hidden_size=32,
    wide_steps=2,
    wide_layers=(0, 1),
    cells=(Plan().cell("cross-entropy"), Plan().cell("dense"), TWO),
)


@asynccontextmanager
async def opened(folder: str) -> AsyncIterator[Teacher]:
    tokenizer = fingerprint(load_tokenizer(folder))
    yield FakeTeacher(fake_identity(vocab_size=512, tokenizer_sha256=tokenizer, model=Path(folder).name))


def write_packages(folder: Path) -> None:
    for i, text in enumerate(topics(70, characters=2000)):
        root = folder / "root" / ("books" if i % 2 else "programs")
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{i}.txt").write_text(text, encoding="utf-8")


@pytest.mark.slow  # a whole study, of a benchmark: it takes as long as a hundred tests
def test_a_study_stops_and_goes_on_and_its_page_says_what_is_there(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    work, docs = tmp_path / "work", tmp_path / "docs"
    write_packages(work)
    study = Study(PLAN, work, docs, opened)
    results = work / "results"
    study.run(model, lambda: len(list(results.glob("*.json"))) >= 2)
    assert {file.name for file in results.iterdir()} == {"cross-entropy-0.json", "dense-0.json"}
    assert "2 of 6 runs" in study.write_page()
    page = (docs / "study.md").read_text()
    assert "dense (1)" in page.split("## Claims")[0], "what is not there is named"
    first = (results / "dense-0.json").read_bytes()

    shutil.rmtree(results)  # those in docs are enough
    asked = count()
    study.run(model, lambda: next(asked) == 5)  # within a run, which goes on from its checkpoint
    study.run(model, lambda: False)
    assert "6 of 6 runs" in study.write_page()
    assert (docs / "study" / "results" / "dense-0.json").read_bytes() == first, "not run again"
    page = (docs / "study.md").read_text()
    assert "Not run yet" not in page
    assert NOT_RUN not in page
    assert "Different ids among the draws of a position, on average: " in page
    assert "two-by-label" in page.split("## A second teacher")[1]
    assert {file.name for file in (docs / "study").glob("*.svg")} >= {"loss-cross-entropy.svg", "curves.svg"}

    check_numbers(Results(PLAN, load_results([docs / "study" / "results"], PLAN, study_text(docs))))
    check_draws(work)
    more = replace(PLAN, seeds=(0, 1, 2), cells=(*PLAN.cells, Plan().cell("top-8")))
    assert "6 of 12 runs" in Study(more, work, docs, opened).write_page(), "further seeds and cells go on from these"
    with pytest.raises(SpecMismatch, match="results of two do not compare"):
        Study(replace(PLAN, lr=1e-3), work, docs, opened).write_page()


def study_text(docs: Path) -> str:
    return text_sha256(json.loads((docs / "study" / "text.json").read_text()))


def check_numbers(results: Results) -> None:
    one = results.of("dense")[0]
    assert sum(one.labels) == 12 * 23
    assert sum(one.positions) == 12 * 24
    assert set(one.kinds) == {"prose", "Python"}
    assert sum(count for count, _, _ in one.bins) == sum(one.labels)
    assert one.tokens == 2 * 2 * 24
    assert results.of("two-by-label")[0].parameters > one.parameters
    # Kinds are parts of the whole.
    loss = {kind: results.mean("dense", "loss", kind) or 0.0 for kind in ("prose", "Python")}
    mean = results.mean("dense", "loss")
    assert mean is not None
    assert min(loss.values()) <= mean <= max(loss.values())
    assert {each.seeds for each in judged(results)} == {2}


def check_draws(work: Path) -> None:
    targets = Cache.open(work / "cache").targets(FEWER_DRAWS, "sample")
    found = targets.read(0, 24)
    assert found.draws is not None
    sums = np.add.reduceat(found.draws.counts.astype(int), found.draws.offsets[:-1])
    assert sums.tolist() == [PLAN.fewer_draws] * 24


def test_fewer_draws_are_some_of_all() -> None:
    draws = Draws(np.array([0, 2, 3]), np.array([4, 9, 7], np.uint32), np.array([30, 20, 50], np.uint16))
    few = [some_of(draws, 10, np.random.default_rng(seed)) for seed in range(400)]
    of_first = [int(each.counts[each.ids == 4].sum()) for each in few]
    assert all(int(each.counts.sum()) == 20 for each in few)
    # Of 50, 30 are of id 4: hypergeometric of mean 6 and standard deviation 1.4, so 0.07 over 400.
    assert abs(float(np.mean(of_first)) - 6.0) < 0.35


def test_markup_is_taken_out() -> None:
    groff = '.TH LS 1\n.\\" a remark\n.SH NAME\n.B ls\n\\- list\\fB all\\fR \\(dqfiles\\(dq\n.so man1/dir.1\n'
    assert groff_text(groff).split() == ["LS", "1", "NAME", "ls", "-", "list", "all", '"files"']
    assert pod_text("=head1 NAME\n\nB<perl> - C<I<x>>\n\n=cut\n").split() == ["NAME", "perl", "-", "x"]
    assert html_text("<head><title>t</title></head><p>one <b>two</b></p><p>three</p>").split() == [
        "one",
        "two",
        "three",
    ]


@pytest.mark.slow
def test_the_real_engine_answers_in_a_process_of_its_own(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    write_packages(tmp_path)
    prepare_text(PLAN, tmp_path)
    cache = prepare_corpora(PLAN, tmp_path, model)
    with pytest.raises(Stopped):
        prepare_first(PLAN, cache, model, Scoring(tmp_path, lambda: True))
    prepare_first(PLAN, cache, model, Scoring(tmp_path, lambda: False))
    found = cache.targets(TEACHER, SAMPLE).read(0, 96)
    assert found.dense is not None
    assert np.allclose(np.exp(found.dense).sum(axis=1), 1.0, atol=2e-3), "two bytes each"
    assert (found.dense.argmax(axis=1) == found.ids[:, 0]).mean() > 0.99
