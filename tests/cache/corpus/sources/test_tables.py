"""Parquet and Arrow files, the latter as the real `datasets` saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.errors import InvalidInput
from potstill.cache.store.root import Root
from tests.support.corpora import byte_tokenizer, texts_of

IDS = [[1, 2, 3], [], [4] * 60, [255]]
ROWS = [row for row in IDS if row]
AS_IDS = IngestPlan(ids_field="input_ids", row_tokens=100)


def ingested(source: Path, plan: IngestPlan = AS_IDS) -> Corpus:
    return ingest(Root.open("memory://", create=True), "docs", [source], byte_tokenizer(), plan)


def rows_of(corpus: Corpus) -> list[list[int]]:
    return [row.tolist() for row in corpus.rows(0, len(corpus))]


@pytest.mark.parametrize("integer", [pa.int64(), pa.int32(), pa.uint16(), pa.uint8()])
@pytest.mark.parametrize("make", [pa.list_, pa.large_list])
def test_lists_of_any_integer_are_rows(tmp_path: Path, integer: pa.DataType, make: Any) -> None:
    table = pa.table({"input_ids": pa.array(IDS, make(integer)), "text": list("abcd")})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    corpus = ingested(tmp_path / "a.parquet")
    assert rows_of(corpus) == ROWS
    assert corpus.spec.sources[0].documents == 3
    assert texts_of(tmp_path / "a.parquet") == list("abcd")


def test_fixed_lists_are_rows_and_long_ones_are_cut(tmp_path: Path) -> None:
    blocks = np.arange(64).reshape(4, 16)
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), 16)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(ingested(tmp_path / "a.parquet", IngestPlan(ids_field="input_ids", row_tokens=10))) == [
        part.tolist() for block in blocks for part in (block[:10], block[10:])
    ]


def test_ids_of_json_lines_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"input_ids": {ids}}}\n' for ids in IDS))
    assert rows_of(ingested(tmp_path / "a.jsonl")) == ROWS


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[1, 256]", r"has the token id 256, the tokenizer's ids end at 255; give the tokenizer that made it"),
        ("[1, -1]", r"has the token id -1, below 0: is that column of labels"),
        ("[1, 2.5]", r"has \[1.0, 2.5\]|has \[1, 2.5\]"),
        ("[1, null]", r"has \[1, None\] under 'input_ids', which is no list of token ids"),
        ("null", r"no list of token ids under|no ids under"),
        ("[99999999999999999999]", r"has \[99999999999999999999\] under"),
        ('"text"', r"has 'text' under 'input_ids', which is no list of token ids"),
    ],
)
def test_ids_that_are_none_are_named(tmp_path: Path, ids: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"input_ids": [1]}}\n{{"input_ids": {ids}}}\n')
    with pytest.raises(InvalidInput, match=rf"a\.jsonl:2 .*({message})"):
        ingested(tmp_path / "a.jsonl")
    if "99999" in ids:
        return
    pq.write_table(pa.table({"input_ids": [json.loads(ids)]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInput, match=rf"a\.parquet: row 0 .*({message})"):
        ingested(tmp_path / "a.parquet")


def test_a_null_in_a_column_is_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1500 + [None] + ["b"]}), path, row_group_size=400)
    with pytest.raises(InvalidInput, match=r"a\.parquet: row 1500 has no text under 'text'; mend it, or leave"):
        texts_of(path)
    assert texts_of(path, skip_bad=True) == ["a"] * 1500 + ["b"]
    with pytest.raises(InvalidInput, match=r"has no column 'body'; it has text: name one with --text-field"):
        texts_of(path, "body", skip_bad=True)
    with pytest.raises(InvalidInput, match=r"has no column 'input_ids'; it has text: name one with --ids-field"):
        ingested(path)
    pq.write_table(pa.table({"text": [b"\x00"]}), path)
    with pytest.raises(InvalidInput, match=r"row 0 has b'\\x00' under 'text', which is no text"):
        texts_of(path)
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff")]
    )
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(InvalidInput, match=r"row 1: column 'text' is not UTF-8"):
        texts_of(path)
    assert texts_of(path, skip_bad=True) == ["ok"]


def test_folders_that_datasets_saved_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, load_from_disk

    made = Dataset.from_dict({"input_ids": IDS, "text": ["one", "two", "three", "four"]})
    made.save_to_disk(tmp_path / "plain", num_shards=2)
    assert rows_of(ingested(tmp_path / "plain")) == ROWS
    assert texts_of(tmp_path / "plain") == ["one", "two", "three", "four"]
    # What is computed on a data set lies beside it, in Arrow files that are no part of it.
    load_from_disk(str(tmp_path / "plain")).map(lambda row: {"more": row["text"] * 2})
    assert list((tmp_path / "plain").glob("cache-*.arrow"))
    assert texts_of(tmp_path / "plain") == ["one", "two", "three", "four"]
    DatasetDict({"test": made.select([3, 0]), "train": made}).save_to_disk(tmp_path / "split")
    corpus = ingested(tmp_path / "split")
    assert rows_of(corpus) == [[255], [1, 2, 3], *ROWS]
    names = ["test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow"]
    assert [source.name for source in corpus.spec.sources] == names
    assert rows_of(ingested(tmp_path / "split" / "train")) == ROWS
    (tmp_path / "plain" / "state.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"state\.json does not name the data set's files; save it again"):
        texts_of(tmp_path / "plain")


def test_arrow_files_of_either_format_are_read(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        with make(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        assert texts_of(tmp_path / "a.arrow") == ["a", "b"]
    (tmp_path / "a.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(InvalidInput, match=r"a\.arrow cannot be read as Arrow: "):
        texts_of(tmp_path / "a.arrow")
