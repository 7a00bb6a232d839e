"""The choice of rows that no student is trained on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput
from potstill.student_trainer.data.held_out import choose_held_out, num_documents, with_copies
from tests.support.tiny_runs import write_cache, write_texts_cache

FROZEN_HELD_OUT = [8, 23, 24, 116, 117]


def starts_of(sizes: list[int]) -> NDArray[np.int64]:
    """The rows at which documents of so many rows start, and their end."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def chosen(sizes: list[int], held_out: float, seed: int = 0) -> list[int]:
    return [int(row) for row in choose_held_out(starts_of(sizes), held_out, seed, "docs")]


def test_the_choice_never_changes() -> None:
    """Runs resume under newer versions of everything: these numbers are frozen."""
    assert chosen([3, 1, 4, 1, 5, 9, 2, 6] * 4, 5) == FROZEN_HELD_OUT


@settings(max_examples=200)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=40), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_whole_documents_are_held_out_as_long_as_they_fit(sizes: list[int], seed: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(min(sizes), sum(sizes) - 1))
    rows = chosen(sizes, wanted, seed)
    starts = starts_of(sizes).tolist()
    documents = {d: set(range(a, b)) for d, (a, b) in enumerate(pairwise(starts))}
    held = [d for d, of in documents.items() if of & set(rows)]
    assert rows == sorted({row for d in held for row in documents[d]}), "none is cut"
    assert 0 < len(rows) <= wanted
    assert num_documents(starts_of(sizes), np.array(rows)) == len(held)
    left = wanted - len(rows)
    assert all(size > left for d, size in enumerate(sizes) if d not in held), "no other would fit"


def test_held_out_counts_and_shares() -> None:
    ones = [1] * 1000
    assert len(chosen(ones, 0.05)) == len(chosen(ones, 50)) == 50
    assert len(chosen([1] * 10, 0.01)) == 1
    assert chosen([1] * 10, 0) == []
    assert chosen(ones, 50) != chosen(ones, 50, 1)


@pytest.mark.parametrize(
    ("sizes", "held_out", "message"),
    [
        ([1] * 10, 10, r"^data\.held_out is 10, but corpus 'docs' has 10 rows; leave some"),
        (
            [9],
            0.5,
            r"0\.5, 4 rows, but whole documents are held out, and corpus 'docs' is one document; ingest",
        ),
        ([9, 7], 6, r"6, 6 rows, but whole documents are held out, and the smallest of 'docs' has 7; ask for as many"),
    ],
)
def test_what_cannot_be_held_out_is_said_in_one_line(sizes: list[int], held_out: float, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        chosen(sizes, held_out)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"w1 w2 w{3 + i % 4}" for i in range(20)]
    folder = tmp_path_factory.mktemp("repeated")
    write_texts_cache(folder, texts[:6], corpus="more")
    return write_texts_cache(folder, texts)


def test_copies_of_held_out_rows_are_left_out_too(repeated: Path) -> None:
    corpus = Cache.open(repeated).corpus("docs")
    (left_out,) = with_copies([corpus], [np.array([1])])
    expected = [i for i in range(len(corpus)) if (corpus.row(i) == corpus.row(1)).all()]
    assert left_out.tolist() == expected
    assert len(expected) == 5


def test_copies_in_another_corpus_are_left_out_too(repeated: Path) -> None:
    cache = Cache.open(repeated)
    docs, more = cache.corpus("docs"), cache.corpus("more")
    found = with_copies([docs, more], [np.zeros(0, np.int64), np.array([1])])
    for corpus, left_out in zip((docs, more), found, strict=True):
        assert left_out.tolist() == [i for i in range(len(corpus)) if (corpus.row(i) == more.row(1)).all()]


def test_without_repeated_rows_nothing_else_is_left_out(tmp_path: Path) -> None:
    corpus = Cache.open(write_cache(tmp_path, documents=6, teachers=())).corpus("docs")
    rows: NDArray[np.int64] = np.array([0, 3])
    (left_out,) = with_copies([corpus], [rows])
    assert left_out is rows


def test_no_row_that_is_trained_on_is_of_a_held_out_document(tmp_path: Path) -> None:
    corpus = Cache.open(write_cache(tmp_path, documents=60, teachers=())).corpus("docs")
    held_out = choose_held_out(corpus.document_rows, 0.3, 0, "docs")
    document_of = np.searchsorted(corpus.document_rows, np.arange(len(corpus)), side="right")
    trained_on = np.setdiff1d(np.arange(len(corpus)), held_out)
    assert len(held_out) > 10
    assert not set(document_of[held_out]) & set(document_of[trained_on])
