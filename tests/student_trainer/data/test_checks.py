"""Targets that no distribution has, or that are of other tokens than the next ones, are refused as they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Targets, Tokens
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.sources import TargetSource, cache_source
from tests.support.tiny_runs import K, fake_teacher, fill, write_cache

Change = Callable[[Targets, Tokens], Targets]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_cache(tmp_path_factory.mktemp("cache"))
    write_cache(root.parent, documents=20, corpus="more", seed=1)
    return root


def reader_of(corpora: Sequence[Corpus], change: Change, only_in: str = "") -> BatchReader:
    """A reader of corpora whose teacher's answers are changed, in one of them or in all."""

    def source(corpus: Corpus) -> TargetSource:
        def read(_: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
            answers = [fake_teacher().distribution(row, K) for row in rows]
            if only_in not in ("", corpus.name):
                return answers
            return [change(each, row) for each, row in zip(answers, rows, strict=True)]

        return TargetSource("fake", fake_teacher().identity, "k=8, encoding f32", read)

    joined = JoinedCorpora(tuple(corpora))
    return BatchReader(joined, (joined.source([source(each) for each in corpora]),), (1.0,))


def moved(targets: Targets, by: int, *, labels: bool = True) -> Targets:
    """The targets `by` positions later, from the first again at the end."""
    later = Targets.concat([targets[by:], targets[:by]])
    return later if labels else replace(later, label_logprob=targets.label_logprob)


def with_labels_of_top_k(targets: Targets, row: Tokens) -> Targets:
    """The targets as an import without labels makes them."""
    here = targets.ids[:-1] == row[1:, None]
    found = np.where(here, targets.logprobs[:-1], np.nan)
    labels = np.where(here.any(axis=1), np.nanmax(np.where(here, found, -np.inf), axis=1), np.nan)
    return replace(targets, label_logprob=np.append(labels, np.nan).astype(np.float32))


@pytest.mark.parametrize("name", ["log_z", "entropy"])
def test_nan_beside_the_top_k_is_named_with_its_row(root: Path, name: str) -> None:
    def change(targets: Targets, _: Tokens) -> Targets:
        numbers = np.zeros(targets.num_positions, np.float32)
        numbers[2] = np.nan
        return replace(targets, log_z=numbers[:, None]) if name == "log_z" else replace(targets, entropy=numbers)

    with pytest.raises(TeacherFailed, match=r"teacher 'fake' has NaN at position 2 of row 3 of corpus 'docs'"):
        reader_of([Cache.open(root).corpus("docs")], change).read([3])


@pytest.mark.parametrize(
    ("value", "told"), [(np.nan, "NaN"), (0.5, r"a mass of \d+(\.\d+)?, over 1,"), (np.inf, "inf")]
)
@pytest.mark.parametrize("name", ["logprobs", "log_tail"])
def test_a_number_that_no_distribution_has_is_named_with_its_row(
    root: Path, name: str, value: float, told: str
) -> None:
    cache = Cache.open(root)
    docs, more = cache.corpus("docs"), cache.corpus("more")
    bad_row = more.row(3).tobytes()

    def change(targets: Targets, row: Tokens) -> Targets:
        array = getattr(targets, name).copy()
        if row.tobytes() == bad_row:
            array[2] = value
        return replace(targets, **{name: array})

    reader = reader_of([docs, more], change)
    assert reader.read([3, len(docs) + 2]).num_positions
    with pytest.raises(TeacherFailed, match=rf"'fake' has .*{told}.* at position 2 of row 3 of corpus 'more'"):
        reader.read([3, len(docs) + 3])


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("labels", [True, False])
def test_shifted_targets_are_found_by_their_labels(root: Path, by: int, labels: bool) -> None:
    cache = Cache.open(root)
    corpora = [cache.corpus("docs"), cache.corpus("more")]
    reader = reader_of(corpora, lambda targets, _: moved(targets, by, labels=labels), only_in="more")
    assert reader.read(range(10)).num_positions
    told = "'fake' are not of the next tokens of corpus 'more': its label_logprob .* agrees .* shifted by "
    told += re.escape(f"{by:+d}")
    with pytest.raises(TeacherFailed, match=told):
        reader.read([0, 1, *range(len(corpora[0]), len(corpora[0]) + 4)])


def test_targets_of_other_rows_are_found_by_their_labels(root: Path) -> None:
    corpus = Cache.open(root).corpus("docs")
    reader = reader_of([corpus], lambda targets, row: fake_teacher().distribution(row[::-1], K))
    with pytest.raises(TeacherFailed, match=r"contradicts its top-k at \d+ of \d+ positions; target t"):
        reader.read(range(8))


class CountingTeacher:
    """Finds the next number likeliest, as of rows that count upwards."""

    def targets(self, row: Tokens) -> Targets:
        ids = np.stack([(row + 1 + i * 5) % 40 for i in range(4)], axis=1).astype(np.uint32)
        logprobs = np.tile(np.log([0.7, 0.1, 0.1, 0.05]).astype(np.float32), (len(row), 1))
        tail = np.full(len(row), np.log(0.05), np.float32)
        return with_labels_of_top_k(Targets(ids, logprobs, tail, np.full(len(row), np.nan, np.float32)), row)


@pytest.mark.parametrize("by", [1, -1, 0])
def test_shifted_targets_without_labels_are_found_by_their_tokens(by: int) -> None:
    from potstill.student_trainer.data.checks import check_alignment

    random = np.random.default_rng(0)
    # One number in ten is another than the next, so that some label is not among the top-k.
    starts = random.integers(0, 40, 12, dtype=np.uint32)
    rows = [(np.arange(40, dtype=np.uint32) + start) % 40 for start in starts]
    rows = [np.where(random.random(40) < 0.1, random.integers(0, 40, 40, dtype=np.uint32), row) for row in rows]
    answers = [CountingTeacher().targets(row) for row in rows]
    shifted = [
        with_labels_of_top_k(moved(each, by, labels=False), row) for each, row in zip(answers, rows, strict=True)
    ]
    if by == 0:
        check_alignment("counts", rows, shifted, lambda i: ("docs", i))
        return
    with pytest.raises(
        TeacherFailed, match=rf"its top-k holds \d+% of them, but \d+% where .* shifted by {re.escape(f'{by:+d}')}"
    ):
        check_alignment("counts", rows, shifted, lambda i: ("docs", i))


@pytest.mark.parametrize("encoding", ["u8", "archive", "f16"])
def test_every_encoding_passes(root: Path, encoding: str) -> None:
    fill(root, encoding, encoding=encoding)
    cache = Cache.open(root)
    corpus = cache.corpus("docs")
    for k in (None, 3, 1):
        source = cache_source(encoding, cache.targets(encoding, "docs"), k)
        assert BatchReader(corpus, (source,), (1.0,)).read(range(len(corpus))).num_positions


def test_what_the_encoding_scales_is_not_checked_in_a_run_either(root: Path) -> None:
    fill(root, "coded", encoding="u8")
    corpus, cache = Cache.open(root).corpus("docs"), Cache.open(root)
    joined = JoinedCorpora((corpus,))
    sources = [joined.source([cache_source(name, cache.targets(name, "docs"))]) for name in ("coded", "fake")]
    assert [source.normalised for source in sources] == [True, False]
