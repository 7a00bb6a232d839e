"""Documents of rows and the loss mask: what a corpus of format 3 keeps beside its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from potstill.cache import Cache
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.errors import InvalidInput
from potstill.cache.store.root import Root
from tests.support.corpora import byte_tokenizer, make_corpus
from tests.support.paths import GOLDEN

Document = list[tuple[list[int], list[bool] | None]]


def sealed(root: Root, name: str, documents: list[Document]) -> Corpus:
    """A corpus of documents whose rows have masks."""
    rows = (
        SourceRow(
            np.array(row, np.uint32),
            taught=None if taught is None else np.array(taught),
            ends_document=number == len(document),
        )
        for document in documents
        for number, (row, taught) in enumerate(document, start=1)
    )
    return ingest_rows(root, name, rows, byte_tokenizer(), IngestPlan(row_tokens=9, shard_positions=20))


def a_row() -> st.SearchStrategy[tuple[list[int], list[bool] | None]]:
    def masked(row: list[int]) -> st.SearchStrategy[tuple[list[int], list[bool] | None]]:
        masks = st.lists(st.booleans(), min_size=len(row), max_size=len(row))
        return st.tuples(st.just(row), st.none() | masks)

    return st.lists(st.integers(0, 255), min_size=1, max_size=9).flatmap(masked)


def _teaches(documents: list[Document]) -> bool:
    return any(taught is None or any(taught) for document in documents for _, taught in document)


@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_documents_and_mask_are_read_as_they_came(examples: int) -> None:
    @settings(max_examples=examples)
    @given(documents=st.lists(st.lists(a_row(), max_size=4), min_size=1, max_size=8).filter(_teaches))
    def check(documents: list[Document]) -> None:
        corpus = sealed(Root.open("memory://", create=True), "docs", documents)
        lengths = [len(document) for document in documents if document]
        rows = [row for document in documents for row in document]
        masks = [[True] * len(row) if taught is None else taught for row, taught in rows]
        assert corpus.document_rows.tolist() == np.cumsum([0, *lengths]).tolist()
        assert corpus.num_documents == len(lengths)
        assert corpus.has_loss_mask == (not all(map(all, masks)))
        assert corpus.loss_mask(0, corpus.num_positions).tolist() == [each for mask in masks for each in mask]
        backwards = range(len(corpus))[::-1]
        assert [mask.tolist() for mask in corpus.take_loss_mask(backwards)] == masks[::-1]
        assert all(mask.dtype == np.bool_ for mask in corpus.take_loss_mask(backwards))

    check()


def test_a_file_is_a_document_and_an_empty_one_is_none(tmp_path: Path) -> None:
    _, corpus = make_corpus(tmp_path / "c", texts=["a" * 120, "b" * 50, "", "c" * 50], row_tokens=50)
    assert corpus.document_rows.tolist() == [0, 3, 4, 5]
    assert not corpus.has_loss_mask
    assert corpus.loss_mask(3, 7).tolist() == [True] * 4


def test_documents_nobody_told_are_runs_of_full_rows_and_the_next_shorter_one(tmp_path: Path) -> None:
    lengths = [5, 5, 2, 1, 5, 3, 5, 5]
    rows = [np.arange(length, dtype=np.uint32) for length in lengths]
    corpus = ingest_rows(Root.open(tmp_path), "docs", rows, byte_tokenizer(), IngestPlan(row_tokens=5))
    assert corpus.spec.num_documents is None
    assert corpus.document_rows.tolist() == [0, 3, 4, 6, 8]
    assert corpus.num_documents == 4


@pytest.mark.parametrize("version", ["format-1", "format-2"])
def test_older_corpora_have_the_superset_and_no_mask(version: str) -> None:
    corpus = Cache.open(GOLDEN / version).corpus("docs")
    # Two texts, in rows of 40 tokens: the first has 140, the second 36.
    assert corpus.document_rows.tolist() == [0, 4, 5]
    assert not corpus.has_loss_mask
    assert all(mask.all() for mask in corpus.take_loss_mask(range(len(corpus))))


def test_the_fingerprint_tells_documents_and_masks_apart_and_keys_stay() -> None:
    root = Root.open("memory://", create=True)
    row = [1, 2, 3]
    cases: list[list[Document]] = [
        [[(row, None), (row, None)]],
        [[(row, None)], [(row, None)]],
        [[(row, None), (row, [True, False, True])]],
        [[(row, None), (row, [True, True, False])]],
    ]
    made = [sealed(root, f"docs-{number}", documents) for number, documents in enumerate(cases)]
    assert len({corpus.fingerprint for corpus in made}) == len(cases)
    assert len({corpus.row_keys(0, 2).tobytes() for corpus in made}) == 1


def test_a_stranger_reads_documents_and_mask_with_zarr_alone(tmp_path: Path) -> None:
    documents: list[Document] = [[([1, 2, 3], [False, True, True])], [([4], None), ([5, 6], [False, True])]]
    sealed(Root.open(tmp_path / "c", create=True), "docs", documents)
    group = zarr.open_group(tmp_path / "c" / "corpora" / "docs", mode="r")
    seal: Any = group.attrs["potstill"]
    assert (seal["format"], seal["num_documents"], seal["num_taught"]) == (3, 2, 4)

    def values(name: str) -> NDArray[Any]:
        array = zarr.open(tmp_path / "c" / "corpora" / "docs" / seal["data"] / name, mode="r")
        assert isinstance(array, zarr.Array)
        return np.asarray(array[:])

    assert values("document_rows").dtype == np.int64
    assert values("document_rows").tolist() == [0, 1, 3]
    assert values("loss_mask").dtype == np.bool_
    assert values("loss_mask").tolist() == [False, True, True, True, False, True]


def test_rows_that_teach_nothing_are_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no token of the rows is to be learnt; a corpus needs one"):
        sealed(Root.open(tmp_path), "docs", [[([1, 2], [False, False])]])
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("mask", [np.ones(2, bool), np.ones(3, np.uint8), np.ones((3, 1), bool)])
def test_a_mask_that_is_not_of_its_row_is_refused(tmp_path: Path, mask: NDArray[Any]) -> None:
    rows = [SourceRow(np.arange(3, dtype=np.uint32)), SourceRow(np.arange(3, dtype=np.uint32), taught=mask)]
    with pytest.raises(InvalidInput, match=r"row 1 has a loss mask of .*; it must be bool\[3\]"):
        ingest_rows(Root.open(tmp_path), "docs", rows, byte_tokenizer(), IngestPlan())
    assert list(tmp_path.rglob("*")) == []
