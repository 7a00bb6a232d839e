from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from potstill.cache import Cache
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, IngestProgress, cut, ingest, ingest_rows
from potstill.cache.corpus.keys import row_key
from potstill.cache.corpus.seal import Source
from potstill.cache.corpus.sources import Field, list_sources
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.corpus.tokenizer import fingerprint, load_tokenizer
from potstill.cache.corpus.writing import shard_bounds
from potstill.cache.errors import AlreadyExists, CorruptSegment, FormatError, InvalidInput, UnknownCorpus
from potstill.cache.store.record import format_version
from potstill.cache.store.root import Root
from tests.support.corpora import byte_tokenizer, make_corpus, texts_of, topics, write_texts
from tests.support.paths import GOLDEN


def test_rows_never_cross_a_document_and_leave_no_hole(tmp_path: Path) -> None:
    texts = ["a" * 120, "b" * 7, "", "c" * 50]
    _, corpus = make_corpus(tmp_path / "c", texts=texts, row_tokens=50, shard_positions=60)
    rows = corpus.rows(0, len(corpus))
    assert [len(row) for row in rows] == [50, 50, 20, 7, 50]
    assert "".join(corpus.tokenizer.decode(row.tolist()) for row in rows) == "".join(texts)
    assert np.array_equal(np.concatenate(rows), corpus.tokens(0, corpus.num_positions))
    assert corpus.shard_rows.tolist() == [0, 1, 2, 4, 5]


def test_shards_are_whole_rows_up_to_the_limit() -> None:
    starts = np.array([0, 10, 20, 30, 31, 100])
    assert shard_bounds(starts, 20).tolist() == [0, 2, 4, 5]
    assert shard_bounds(starts, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert shard_bounds(starts, 1000).tolist() == [0, 5]
    blocks = [np.arange(4, dtype=np.uint32), np.arange(0, dtype=np.uint32), np.arange(4, 7, dtype=np.uint32)]
    assert [row.tolist() for row in cut(blocks, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_stranger_reads_the_corpus_with_zarr_alone(tmp_path: Path) -> None:
    _, corpus = make_corpus(tmp_path / "c")
    group = zarr.open_group(tmp_path / "c" / "corpora" / "docs", mode="r")
    seal = group.attrs["potstill"]
    assert isinstance(seal, dict)
    tokens = group[f"{seal['data']}/tokens"]
    assert isinstance(tokens, zarr.Array)
    assert np.array_equal(np.asarray(tokens[:]), corpus.tokens(0, corpus.num_positions))
    assert seal["sources"][0]["documents"] == 1
    assert len(seal["sources"][0]["sha256"]) == 64


def test_rows_are_found_by_key_the_first_of_duplicates(tmp_path: Path) -> None:
    _, corpus = make_corpus(tmp_path / "c", texts=["same text", "other", "same text"])
    assert corpus.spec.duplicate_rows == 1
    keys = [row_key(corpus.tokenizer_sha256, corpus.row(i)) for i in range(len(corpus))]
    assert corpus.find([*keys, b"\x00" * 16, b"\xff" * 16]) == [0, 1, 0, None, None]
    assert corpus.row_keys(1, 2).tobytes() == keys[1]


def test_a_sealed_name_is_taken_and_the_corpus_untouched(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    with pytest.raises(AlreadyExists, match="'docs' is sealed"):
        make_corpus(tmp_path / "c", texts=["x"])
    assert before == {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert Corpus.open(cache.root, "docs").fingerprint == corpus.fingerprint


def test_jsonl_and_parquet_give_one_document_a_record(tmp_path: Path) -> None:
    texts = topics(3)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n\n" for t in texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert texts_of(tmp_path / name, "body") == texts
    root = Root.open(tmp_path / "c", create=True)
    corpus = ingest(
        root,
        "both",
        [tmp_path / "a.jsonl", tmp_path / "b.parquet"],
        byte_tokenizer(),
        IngestPlan(text_field="body"),
    )
    assert [source.documents for source in corpus.spec.sources] == [3, 3]
    assert corpus.spec.duplicate_rows == len(corpus) // 2


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("caf\u00e9", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "caf\u00e9"}\n', encoding="utf-8-sig")
    for name in ("a.txt", "a.jsonl"):
        assert texts_of(tmp_path / name) == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{broken\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has no text under 'text'"),
        ("a.txt", b"ok \xff", r"a\.txt is not UTF-8: invalid start byte at byte 3"),
        ("a.parquet", b"PAR1 no", r"a\.parquet cannot be read as Parquet"),
        ("a.txt", b"", "a corpus cannot be empty"),
        ("a.pdf", b"%PDF", "is not .txt"),
    ],
)
def test_a_bad_source_is_named_and_nothing_is_left(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    root = Root.open(tmp_path / "c", create=True)
    with pytest.raises(InvalidInput, match=message):
        ingest(root, "docs", [tmp_path / name], byte_tokenizer(), IngestPlan())
    assert list((tmp_path / "c").rglob("*")) == []


def test_missing_sources_tokenizers_and_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'nowhere' does not exist"):
        list_sources(["nowhere"], Field())
    with pytest.raises(InvalidInput, match="holds no .txt"):
        list_sources([tmp_path], Field())
    with pytest.raises(InvalidInput, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UnknownCorpus, match="no corpus 'x'"):
        Cache.open(tmp_path).corpus("x")
    with pytest.raises(InvalidInput, match="the folder does not exist"):
        Cache.open(tmp_path / "none")


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "a" * 65, "ä", "a b"])
def test_a_hostile_name_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="name .* cannot be used"):
        make_corpus(tmp_path / "c", name=name) if "/" not in name and name else Cache.open(tmp_path).corpus(name)


def test_a_corpus_of_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c")
    seal = tmp_path / "c" / "corpora" / "docs" / "zarr.json"
    metadata = json.loads(seal.read_text())
    metadata["attributes"]["potstill"]["format"] = 99
    seal.write_text(json.dumps(metadata))
    with pytest.raises(
        FormatError, match=f"has format 99, this version reads up to {format_version('corpus')}; install"
    ):
        Cache.open(tmp_path / "c").corpus("docs")


def test_a_missing_or_cut_object_is_an_error_that_names_it(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c")
    tokens = next((tmp_path / "c").rglob("tokens/c/0"))
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(CorruptSegment, match="tokens/c/0 has"):
        Cache.open(tmp_path / "c").corpus("docs")
    tokens.unlink()
    with pytest.raises(CorruptSegment, match="tokens/c/0 is missing"):
        Cache.open(tmp_path / "c").corpus("docs")


def test_the_fingerprint_is_of_bytes_and_special_ids_not_of_files(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=True)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
    other = byte_tokenizer()
    other.add_special_tokens(["<end>"])
    assert fingerprint(other) != fingerprint(tokenizer)
    plain = byte_tokenizer()
    plain.add_tokens(["<end>"])
    assert fingerprint(plain) not in {fingerprint(other), fingerprint(tokenizer)}


def test_truncation_a_tokenizer_file_asks_for_is_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(5)
    root = Root.open(tmp_path / "c", create=True)
    source = write_texts(tmp_path / "text", ["x" * 40])
    assert ingest(root, "docs", [source], tokenizer, IngestPlan()).num_positions == 40


TOKENS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=40)


@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_rows_of_tokens_are_kept_as_they_are(examples: int) -> None:
    @settings(max_examples=examples)
    @given(rows=TOKENS, shard_positions=st.integers(1, 50))
    def check(rows: list[list[int]], shard_positions: int) -> None:
        plan = IngestPlan(row_tokens=9, shard_positions=shard_positions)
        arrays = [np.array(row, dtype=np.uint32) for row in rows]
        corpus = ingest_rows(Root.open("memory://", create=True), "rows", iter(arrays), byte_tokenizer(), plan)
        assert [row.tolist() for row in corpus.rows(0, len(corpus))] == rows
        assert corpus.find([corpus.key(row) for row in arrays]) == [rows.index(row) for row in rows]
        assert corpus.spec.duplicate_rows == len(rows) - len(set(map(tuple, rows)))
        assert (corpus.spec.longest_row, corpus.spec.max_token_id) == (max(map(len, rows)), max(map(max, rows)))
        assert corpus.row_starts.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
        assert np.array_equal(corpus.shard_starts, corpus.row_starts[corpus.shard_rows])
        assert np.array_equal(corpus.shard_rows, shard_bounds(corpus.row_starts, shard_positions))

    check()


def test_the_same_rows_are_the_same_corpus_whether_they_came_as_text_or_as_tokens(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    rows = corpus.rows(0, len(corpus))
    came = Source(name="rows.parquet", sha256="0" * 64, documents=len(rows))
    seen: list[IngestProgress] = []
    again = ingest_rows(
        cache.root,
        "again",
        (row for _ in range(100) for row in rows),
        byte_tokenizer(),
        IngestPlan(row_tokens=50, shard_positions=1000),
        sources=(came,),
        on_progress=seen.append,
    )
    assert again.spec.sources == (came,)
    assert again.spec.duplicate_rows >= 99 * len(rows)
    assert seen[0].tokens > 0
    ends = set(corpus.document_rows[1:].tolist())
    told = [SourceRow(row, ends_document=number in ends) for number, row in enumerate(rows, start=1)]
    once = ingest_rows(cache.root, "once", told, byte_tokenizer(), IngestPlan(row_tokens=50, shard_positions=1000))
    assert once.fingerprint == corpus.fingerprint != again.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.zeros(0, np.uint32), "row 1 is empty; a row has at least one token: leave it out"),
        (np.zeros(10, np.uint32), "row 1 has 10 tokens, the corpus takes rows of up to 9; raise --row-tokens or cut"),
        (np.array([1, 256], np.uint32), "row 1 has the token id 256, the tokenizer's ids end at 255; give the"),
        (np.array([3, -1]), "row 1 has the token id -1"),
        (np.array([0.5]), "row 1 is float64"),
        (np.zeros((2, 2), np.uint32), "row 1 is uint32"),
    ],
)
def test_a_row_that_cannot_be_is_named_and_nothing_is_left(tmp_path: Path, row: NDArray[Any], message: str) -> None:
    rows = [np.array([1, 2], np.uint32), row, np.array([1], np.uint32)]
    with pytest.raises(InvalidInput, match=message):
        ingest_rows(Root.open(tmp_path), "docs", rows, byte_tokenizer(), IngestPlan(row_tokens=9))
    with pytest.raises(InvalidInput, match="a corpus cannot be empty"):
        ingest_rows(Root.open(tmp_path), "docs", [], byte_tokenizer(), IngestPlan())
    assert list(tmp_path.rglob("*")) == []


def test_starts_and_row_ranges_read_what_row_starts_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 10_000)
    tokens = rng.integers(0, 256, int(lengths.sum()), dtype=np.uint32)
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    corpus = ingest_rows(Root.open(tmp_path), "docs", rows, byte_tokenizer(), IngestPlan())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for start, stop in ((0, 0), (0, 1), (4095, 4097), (9999, 10_000), (10_000, 10_000), (0, 10_000)):
        assert np.array_equal(corpus.starts(start, stop), starts[start : stop + 1])
    some = rng.integers(0, 10_000, 500)
    assert np.array_equal(corpus.row_ranges(some), np.stack([starts[some], starts[some + 1]], axis=1))
    assert corpus.row_ranges([]).shape == (0, 2)
    assert "row_starts" not in vars(corpus), "the whole axis stays on disk"
    assert np.array_equal(corpus.row(4096), rows[4096])
    for bad in ((-1, 1), (0, 10_001), (3, 2)):
        with pytest.raises(InvalidInput, match="are outside corpus 'docs' of 10,000 rows"):
            corpus.starts(*bad)
    with pytest.raises(InvalidInput, match="row 10000 is outside corpus 'docs' of 10,000 rows"):
        corpus.row_ranges([0, 10_000])


def test_a_corpus_of_format_1_is_searched_in_memory() -> None:
    corpus = Cache.open(GOLDEN / "format-1").corpus("docs")
    rows = corpus.rows(0, len(corpus))
    assert corpus.find([*(corpus.key(row) for row in rows), b"\0" * 16]) == [*range(len(rows)), None]
    assert np.array_equal(corpus.shard_starts, corpus.row_starts[corpus.shard_rows])
    assert corpus.annotations() == []
