"""The study's corpora: all of the text, and rows of it that teachers score, sampled by document over the kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.plan import Plan
from potstill.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest, ingest_rows
from potstill.cache.corpus.seal import Source
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.corpus.tokenizer_files import load_tokenizer_files
from potstill.cache.errors import InvalidInput

TEXT, SAMPLE, SPECIALIST = "text", "sample", "specialist"


def prepare_corpora(plan: Plan, folder: Path, model: Path) -> Cache:
    """Make the corpora that are not there yet, and return the cache that has them.

    Raises:
        InvalidInput: a kind has too few documents with a whole row.
    """
    cache = Cache.open(folder / "cache", mode="r+")
    tokenizer, files = load_tokenizer(model), load_tokenizer_files(model)
    kinds = list(dict.fromkeys(package.kind for package in plan.packages))
    if TEXT not in cache.corpora():
        sources = [folder / "text" / f"{kind}.jsonl" for kind in kinds]
        ingest(cache.root, TEXT, sources, tokenizer, IngestPlan(row_tokens=plan.row_tokens), tokenizer_files=files)
    text = cache.corpus(TEXT)
    sampled = _documents(plan, text, kinds)
    parts = {
        SAMPLE: {kind: sampled[kind][:count] for kind, count in plan.rows.items()},
        SPECIALIST: {
            kind: sampled[kind][plan.rows.get(kind, 0) :][:count] for kind, count in plan.specialist_rows.items()
        },
    }
    how = IngestPlan(row_tokens=plan.row_tokens, shard_positions=plan.shard_positions)
    for name, rows in parts.items():
        if name not in cache.corpora():
            told = tuple(Source(name=kind, sha256=text.fingerprint, documents=len(each)) for kind, each in rows.items())
            ingest_rows(cache.root, name, _rows(text, rows), tokenizer, how, sources=told, tokenizer_files=files)
    return cache


def kinds_of(corpus: Corpus, rows: NDArray[np.int64]) -> list[str]:
    """Tell the kind of each row's document."""
    ends = np.cumsum([source.documents for source in corpus.spec.sources])
    documents = np.searchsorted(corpus.document_rows, rows, side="right") - 1
    return [corpus.spec.sources[i].name for i in np.searchsorted(ends, documents, side="right")]


def _rows(text: Corpus, rows: Mapping[str, NDArray[np.int64]]) -> Iterator[SourceRow]:
    for each in rows.values():
        for row in each.tolist():
            yield SourceRow(text.row(row), ends_document=True)


def _documents(plan: Plan, text: Corpus, kinds: list[str]) -> dict[str, NDArray[np.int64]]:
    """Draw one whole row of each document, in a drawn order of documents, by kind."""
    ends = np.cumsum([0, *(source.documents for source in text.spec.sources)])
    lengths, found = np.diff(text.row_starts), {}
    for kind, first, last in zip(kinds, ends[:-1], ends[1:], strict=True):
        draw = np.random.default_rng([plan.seed, kinds.index(kind)])
        rows = []
        for document in draw.permutation(np.arange(first, last)).tolist():
            start, stop = text.document_rows[document : document + 2].tolist()
            whole = np.arange(start, stop)[lengths[start:stop] == plan.row_tokens]
            if len(whole):
                rows.append(int(draw.choice(whole)))
        wanted = plan.rows.get(kind, 0) + plan.specialist_rows.get(kind, 0)
        if len(rows) < wanted:
            raise InvalidInput(f"{kind!r} has {len(rows)} documents with a whole row, but {wanted} are wanted")
        found[kind] = np.asarray(rows, dtype=np.int64)
    return found
