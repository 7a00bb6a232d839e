"""Parquet files that were made elsewhere, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from potstill.cache import Cache
from potstill.cache.errors import InvalidInput
from potstill.cache.interchange.row_files import row_files
from tests.support.command_line import refused, run
from tests.support.corpora import byte_tokenizer, make_corpus
from tests.support.parquet_files import TEACHER, export, foreign, make_targets, take


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("large", [False, True])
def test_files_made_elsewhere_are_sorted_and_their_tail_and_labels_found(
    tmp_path: Path, tokenizer: Path, *, large: bool
) -> None:
    foreign(tmp_path / "files" / "part_10.parquet", large=large, input_ids=[[100 + t for t in range(5)]] * 3)
    foreign(tmp_path / "files" / "part_9.parquet", large=large)
    assert run(*take(tmp_path / "files", tmp_path / "b", tokenizer, *TEACHER)) == 0
    back = Cache.open(tmp_path / "b").targets("fake", "docs")
    assert back.corpus.row(0).tolist() == [0, 1, 2, 3, 4]
    assert back.corpus.row(3).tolist() == [100, 101, 102, 103, 104]
    assert [source.name for source in back.corpus.spec.sources] == ["part_9.parquet", "part_10.parquet"]
    found = back.read(0, 5)
    assert found.ids[0].tolist() == [1, 0]
    np.testing.assert_array_equal(found.logprobs, np.array([[-0.5, -2.0]] * 5, np.float32))
    np.testing.assert_allclose(np.exp(found.log_tail), 1 - np.exp(-0.5) - np.exp(-2.0), rtol=1e-6)
    np.testing.assert_array_equal(found.label_logprob, np.array([-0.5] * 4 + [np.nan], np.float32))
    assert (back.identity.model, back.identity.weights_sha256) == ("someone/model", "unknown")


LOGPROBS = [[[-2.0, -0.5]] * 5 for _ in range(3)]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"ids": None}, "has no column 'ids'; it has input_ids, logprobs"),
        ({"input_ids": None}, "has no column 'input_ids'; it has ids, logprobs"),
        ({"input_ids": [[1] * 5, [2] * 5, [300] * 5]}, "row 2: id 300 is outside the vocabulary of 256"),
        ({"input_ids": [[1] * 5, [2] * 5, [-3] * 5]}, "row 2: id -3 is outside the vocabulary of 256"),
        ({"input_ids": [[1] * 5, [], [3] * 5]}, "row 1: column 'input_ids' is empty"),
        ({"input_ids": [[1] * 5, None, [3] * 5]}, "row 1: column 'input_ids' is null"),
        ({"input_ids": ["a", "b", "c"]}, "column 'input_ids' is string; it must be a list per row"),
        ({"ids": [[[1, 2]] * 5, [[1, 2]] * 4 + [[1, 256]], [[1, 2]] * 5]}, "row 1: id 256 is outside the vocabulary"),
        ({"ids": [[[1, 2]] * 5, [[1, 2]] * 5, [[1, 2]] * 4 + [[1]]]}, "row 2: 'ids' has 1 entries at a position"),
        ({"ids": [[[1, 2]] * 5, [[1, 2]] * 4, [[1, 2]] * 5]}, "row 1: 'ids' has 4 positions, 'input_ids' 5"),
        ({"ids": [[[1, 2]] * 5, [[1, 2]] * 5, [[7, 7]] * 5]}, "row 2: 'ids' has an id twice at a position"),
        ({"ids": [[1] * 5] * 3}, "column 'ids' has int64 at a position; it must be a list"),
        ({"logprobs": [LOGPROBS[0], [[-2.0, float("nan")]] * 5, LOGPROBS[2]]}, "row 1: 'logprobs' has NaN"),
        ({"logprobs": [LOGPROBS[0], LOGPROBS[1], [[0.5, 0.2]] * 5]}, "row 2: 'logprobs' and 'log_tail' hold 2.8"),
        ({"log_tail": [[-1.4] * 5, [-1.4] * 5, [-0.1] * 5]}, "row 0: 'logprobs' and 'log_tail' hold 0.98"),
        ({"logprobs": [[[1, 2]] * 5] * 3}, "column 'logprobs' is int64 with 0 nulls; it must be floats"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line_that_names_file_and_row(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], line: str
) -> None:
    file = foreign(tmp_path / "files" / "bad.parquet", **columns)
    said = refused(capsys, *take(file, tmp_path / "b", tokenizer, *TEACHER))
    assert said.startswith(f"invalid_input: {file}")
    assert line in said
    cache = Cache.open(tmp_path / "b") if (tmp_path / "b").exists() else None
    assert (
        cache is None
        or not cache.corpora()
        or not cache.teachers("docs")
        or not cache.targets("fake", "docs").committed.any()
    )


def test_what_the_command_line_must_say_is_asked_for(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = foreign(tmp_path / "files" / "a.parquet")
    into = tmp_path / "b"
    assert "name the teacher with --model" in refused(capsys, *take(file, into, tokenizer))
    assert "--vocab-size is needed" in refused(capsys, *take(file, into, tokenizer, "--model", "m"))
    assert "encoding 'u4' is unknown" in refused(capsys, *take(file, into, tokenizer, *TEACHER, "--encoding", "u4"))
    assert "no tokenizer at" in refused(capsys, *take(file, into, tmp_path / "none", *TEACHER))
    assert "does not exist" in refused(capsys, *take(tmp_path / "none", into, tokenizer, *TEACHER))
    assert "is for --format distillkit" in refused(capsys, *take(file, into, tokenizer, "--compression-config", "x"))
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet file" in refused(capsys, *take(tmp_path / "empty", into, tokenizer, *TEACHER))
    (tmp_path / "torn.parquet").write_bytes(file.read_bytes()[:-200])
    assert "torn.parquet cannot be read as Parquet" in refused(
        capsys, *take(tmp_path / "torn.parquet", into, tokenizer)
    )
    assert not into.exists()


def test_rows_of_another_tokenizer_teacher_or_corpus_are_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_targets(tmp_path / "a")
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    other = byte_tokenizer()
    other.add_special_tokens(["<new>"])
    other.save(str(tmp_path / "other.json"))
    line = refused(capsys, *take(tmp_path / "files", tmp_path / "b", tmp_path / "other.json"))
    assert line.startswith(f"spec_mismatch: {tmp_path}/files/shard-000000.parquet was made with tokenizer ")
    line = refused(capsys, *take(tmp_path / "files", tmp_path / "b", tokenizer, "--model", "m"))
    assert "says whose targets it holds; leave --model away" in line
    make_corpus(tmp_path / "c", texts=["another text " * 50, "and more"])
    line = refused(capsys, *take(tmp_path / "files", tmp_path / "c", tokenizer))
    assert "corpus 'docs' has 14 rows, the files have" in line
    foreign(tmp_path / "own" / "a.parquet")
    assert run(*take(tmp_path / "own", tmp_path / "d", tokenizer, *TEACHER)) == 0
    foreign(tmp_path / "own" / "a.parquet", input_ids=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 10], [10, 11, 12, 13, 14]])
    line = refused(capsys, *take(tmp_path / "own", tmp_path / "d", tokenizer, *TEACHER))
    assert line.startswith(f"spec_mismatch: {tmp_path}/own/a.parquet row 1 is not row 1 of corpus 'docs'")


def test_a_file_whose_metadata_lies_is_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_targets(tmp_path / "a")
    assert run(*export(tmp_path / "a", tmp_path / "files", "--shards", "0:1")) == 0
    table = pq.read_table(tmp_path / "files" / "shard-000000.parquet")
    file = tmp_path / "lies.parquet"
    for key, value, words in [
        (b"potstill.rows", b"9", "has row version b'9'"),
        (b"potstill.identity", b"{", "schema metadata of potstill that cannot be read"),
        (b"potstill.fields", b'{"k": 8, "entropy": true}', "has no column 'entropy'"),
        (b"potstill.fields", b'{"k": 7}', "'ids' has 8 entries at a position, others 7"),
    ]:
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key: value}), file)
        assert words in refused(capsys, *take(file, tmp_path / "b", tokenizer))


def test_files_are_read_by_number_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("data_10.parquet", "data_2.parquet", ".data_3.parquet", "a/data_1.parquet"):
        foreign(tmp_path / "files" / "x.parquet").rename(_made(tmp_path / "files" / name))
    found = row_files([tmp_path / "files"], ("input_ids",))
    assert [str(file.path.relative_to(tmp_path / "files")) for file in found] == [
        "a/data_1.parquet", "data_2.parquet", "data_10.parquet",
    ]  # fmt: skip
    assert [file.first_row for file in found] == [0, 3, 6]
    pq.write_table(pa.table({"input_ids": pa.array([], pa.list_(pa.uint32()))}), tmp_path / "none.parquet")
    with pytest.raises(InvalidInput, match="there is no row"):
        row_files([tmp_path / "none.parquet"], ("input_ids",))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
