"""What corpora of format 3 hold beside their rows, read over HTTP as from their files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.seal import CorpusSpec
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.corpus.tokenizer_files import SpecialTokens
from potstill.cache.errors import TeacherFailed
from potstill.clients.answers import described_corpus
from potstill.clients.http_targets import HttpCache
from tests.support import http
from tests.support.corpora import byte_tokenizer, make_corpus
from tests.support.processes.servers import refused, serving_corpora

FILES = {"tokenizer_config.json": json.dumps({"eos_token": "a"}), "chat_template.jinja": "{{ messages }} \u00e9"}
LATER = {"num_documents", "num_taught"}
"""Keys of a seal that clients of before format 3 do not know."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache with a corpus that has documents, a mask and files, one that has documents, and one that has nothing."""
    cache, _ = make_corpus(tmp_path_factory.mktemp("three") / "cache", name="plain")
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 256, length, np.uint32) for length in rng.integers(1, 20, 500)]
    masked = [SourceRow(row, taught=rng.random(len(row)) < 0.7, ends_document=rng.random() < 0.3) for row in tokens]
    plan = IngestPlan(row_tokens=20)
    ingest_rows(cache.root, "masked", masked, byte_tokenizer(), plan, tokenizer_files=FILES)
    ingest_rows(cache.root, "bare", tokens, byte_tokenizer(), plan)
    return cache


@pytest.fixture(scope="module")
def url(filled: Cache) -> Iterator[str]:
    with serving_corpora(filled) as address:
        yield address


@pytest.fixture(scope="module")
def remote(url: str) -> Iterator[HttpCache]:
    with HttpCache(url, timeout=120) as cache:
        yield cache


@pytest.mark.parametrize("name", ["masked", "plain", "bare"])
def test_documents_mask_and_files_are_read_like_the_corpus_files(remote: HttpCache, filled: Cache, name: str) -> None:
    files, there = filled.corpus(name), remote.corpus(name)
    np.testing.assert_array_equal(there.document_rows, files.document_rows)
    assert there.document_rows.dtype == np.int64
    assert (there.num_documents, there.has_loss_mask) == (files.num_documents, files.has_loss_mask)
    for start, stop in ((0, 1), (17, 1200), (0, files.num_positions)):
        np.testing.assert_array_equal(there.loss_mask(start, stop), files.loss_mask(start, stop))
        assert there.loss_mask(start, stop).dtype == np.bool_
    rows = [len(files) - 1, 0, 5, 5]
    for one, other in zip(there.take_loss_mask(rows), files.take_loss_mask(rows), strict=True):
        assert one.dtype == np.bool_
        np.testing.assert_array_equal(one, other)
    assert there.tokenizer_files == files.tokenizer_files == (FILES if name == "masked" else {})
    assert there.special_tokens == files.special_tokens


def test_a_mask_is_there_to_be_read(remote: HttpCache) -> None:
    masked = remote.corpus("masked")
    assert masked.has_loss_mask
    assert masked.special_tokens == SpecialTokens(
        eos=byte_tokenizer().token_to_id("a"), chat_template="{{ messages }} \u00e9"
    )


def test_clients_of_before_are_refused_a_mask_and_served_the_rest(url: str) -> None:
    known = {field.name for field in dataclasses.fields(CorpusSpec)} - LATER
    for name, unknown in (("masked", {"num_taught"}), ("plain", set()), ("bare", set())):
        # Such a client makes its spec of all keys, and ends with the one that it does not know.
        assert set(http.get(f"{url}/v1/corpora/{name}").json()["spec"]) - known == unknown


def test_a_service_of_before_has_no_documents_and_its_corpus_the_superset(url: str, filled: Cache) -> None:
    described: dict[str, Any] = http.get(f"{url}/v1/corpora/plain").json()
    assert described_corpus(described, url).num_documents == filled.corpus("plain").num_documents
    described.pop("documents")
    described.pop("tokenizer_files")
    assert described_corpus(described, url).num_documents is None


@pytest.mark.parametrize("wrong", [0, -1, 501, 1.5, "5", True, 2**70])
def test_counts_that_no_corpus_has_are_refused(url: str, wrong: object) -> None:
    described: dict[str, Any] = http.get(f"{url}/v1/corpora/masked").json()
    with pytest.raises(TeacherFailed, match="describes its corpus badly: .*num_documents"):
        described_corpus({**described, "documents": wrong}, url)


def test_documents_that_nobody_told_are_refused_in_a_line(url: str) -> None:
    refused(http.get(f"{url}/v1/corpora/bare/document_rows", params={"start": 0, "stop": 1}), 422, "unsupported_field")
    assert http.get(f"{url}/v1/corpora/bare/tokenizer_files").json() == {}


def test_texts_have_an_etag_of_their_content(url: str, filled: Cache, tmp_path: Path) -> None:
    first = http.get(f"{url}/v1/corpora/masked/tokenizer_files")
    assert first.json() == FILES
    again = http.get(f"{url}/v1/corpora/masked/tokenizer_files", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert first.headers["etag"] != http.get(f"{url}/v1/corpora/masked/tokenizer").headers["etag"]
