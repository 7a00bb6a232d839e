from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from cache import Cache, Fields, Targets
from cache.corpus import Corpus
from cache.errors import InvalidInput
from cache.importing import ImportPlan, import_targets
from cache.interchange import RowFormat, export_shards
from cache.parquet import ListColumns, list_columns
from cache.row_files import row_files
from cache.targets import TargetSet
from tests.command_line import refused, run
from tests.corpora import VOCAB, byte_tokenizer, make_corpus, teacher_for, topics
from tests.fakes import FakeTeacher

K = 8
EVERYTHING = Fields(k=K, draws=20, seed=3, entropy=True, temperatures=(2.0, 4.0), dense=True)


def make_small(root: Path) -> tuple[Cache, Corpus]:
    """Four shards."""
    return make_corpus(root, texts=topics(4), shard_positions=700)


def make_targets(root: Path, *, fields: Fields | None = None, encoding: str = "f32") -> TargetSet:
    cache, corpus = make_small(root)
    teacher = teacher_for(corpus)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=fields or Fields(k=K), encoding=encoding)
    fill_all(targets, teacher)
    return targets


def fill_all(targets: TargetSet, teacher: FakeTeacher) -> None:
    corpus = targets.corpus
    pilot = targets.pilot_rows()
    if pilot:
        targets.make_ranks(scored(teacher, corpus, pilot, targets.fields))
    for shard in range(corpus.num_shards):
        rows = range(int(corpus.shard_rows[shard]), int(corpus.shard_rows[shard + 1]))
        assert targets.write_shard(shard, scored(teacher, corpus, rows, targets.fields), teacher.provenance)


def scored(teacher: FakeTeacher, corpus: Corpus, rows: Any, want: Fields) -> Targets:
    return Targets.concat([teacher.targets(corpus.row(row), want) for row in rows])


def everything(targets: TargetSet) -> Targets:
    return targets.read(0, targets.corpus.num_positions)


def assert_same(a: Targets, b: Targets) -> None:
    for name in ("ids", "logprobs", "log_tail", "label_logprob", "entropy", "log_z", "dense"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert (a.draws is None) == (b.draws is None)
    if a.draws is not None and b.draws is not None:
        for name in ("offsets", "ids", "counts"):
            np.testing.assert_array_equal(getattr(a.draws, name), getattr(b.draws, name))


def export(root: Path, folder: object, *more: object) -> list[object]:
    return ["export", root, "--corpus", "docs", "--teacher", "fake", "--to", folder, *more]


def take(folder: Path, root: Path, tokenizer: Path, *more: object) -> list[object]:
    where = ["--cache", root, "--corpus", "docs", "--teacher", "fake", "--tokenizer", tokenizer]
    return ["import", folder, *where, *more]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("encoding", ["f32", "u8"])
@pytest.mark.parametrize("fields", [Fields(k=K), EVERYTHING, Fields(k=0, draws=5), Fields(k=0, entropy=True)])
def test_targets_come_back_from_parquet_bit_for_bit(
    tmp_path: Path, tokenizer: Path, fields: Fields, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """u8 too: its decoded targets are where its codes are."""
    targets = make_targets(tmp_path / "a", fields=fields, encoding=encoding)
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    again = take(tmp_path / "files", tmp_path / "b", tokenizer, "--encoding", encoding, "--shard-positions", 700)
    assert run(*again) == 0, capsys.readouterr().err
    assert "4 shards committed, 0 before; corpus docs made" in capsys.readouterr().out
    back = Cache.open(tmp_path / "b").targets("fake", "docs")
    assert (back.identity, back.fields) == (targets.identity, fields)
    assert back.corpus.fingerprint == targets.corpus.fingerprint
    assert_same(everything(back), everything(targets))


def test_plain_pyarrow_and_pandas_read_what_the_columns_say(tmp_path: Path) -> None:
    targets = make_targets(tmp_path / "a", fields=EVERYTHING)
    corpus, exact = targets.corpus, everything(targets)
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    table = pyarrow.dataset.dataset(tmp_path / "files", format="parquet").to_table()
    rows = table.to_pylist()
    assert [row["input_ids"] for row in rows] == [corpus.row(i).tolist() for i in range(len(corpus))]
    for number in (0, 7, len(corpus) - 1):
        part = exact[slice(*corpus.row_starts[number : number + 2].tolist())]
        row = rows[number]
        for name in ("ids", "logprobs", "entropy", "log_z", "dense"):
            np.testing.assert_array_equal(np.array(row[name], np.float32), getattr(part, name).astype(np.float32))
        assert part.draws is not None
        assert [len(ids) for ids in row["draw_ids"]] == np.diff(part.draws.offsets).tolist()
        assert [sum(counts) for counts in row["draw_counts"]] == [EVERYTHING.draws] * part.num_positions
        assert np.isnan(row["label_logprob"][-1])
        assert not np.isnan(row["label_logprob"][:-1]).any()
    frame = pq.read_table(tmp_path / "files" / "shard-000001.parquet").to_pandas()
    first = int(corpus.shard_rows[1])
    np.testing.assert_array_equal(
        np.stack(frame["ids"].iloc[0]), exact.ids[corpus.row_starts[first] : corpus.row_starts[first + 1]]
    )
    metadata = pq.read_schema(tmp_path / "files" / "shard-000001.parquet").metadata
    assert json.loads(metadata[b"potstill.identity"]) == targets.identity.to_json()
    assert json.loads(metadata[b"potstill.fields"]) == EVERYTHING.to_json()
    assert json.loads(metadata[b"potstill.encoding"])["name"] == "f32"
    assert json.loads(metadata[b"potstill.corpus"])["tokenizer_sha256"] == corpus.tokenizer_sha256


def test_a_prefix_and_some_shards_can_be_exported_and_filled_into_the_same_corpus(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = make_targets(tmp_path / "a")
    make_small(tmp_path / "b")
    assert run(*export(tmp_path / "a", tmp_path / "files", "--top-k", 3, "--shards", "1:3")) == 0
    assert sorted(os.listdir(tmp_path / "files")) == ["shard-000001.parquet", "shard-000002.parquet"]
    assert run(*take(tmp_path / "files", tmp_path / "b", tokenizer, "--encoding", "f32")) == 0
    assert "2 shards committed, 0 before, 2 not in the files; corpus docs was there" in capsys.readouterr().out
    back = Cache.open(tmp_path / "b").targets("fake", "docs")
    assert back.committed.tolist() == [False, True, True, False]
    start, stop = (int(targets.corpus.shard_starts[shard]) for shard in (1, 3))
    assert_same(back.read(start, stop), targets.read(start, stop, k=3))


def test_an_export_goes_on_where_it_stopped_and_refuses_a_folder_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_targets(tmp_path / "a", encoding="u8")
    folder = tmp_path / "files"
    assert run(*export(tmp_path / "a", folder)) == 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "shard-000003.parquet").unlink()
    (folder / ".shard-000003-0123.partial").write_bytes(b"what a killed run leaves")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    capsys.readouterr()
    assert run(*export(tmp_path / "a", folder)) == 0
    assert "1 files written, 3 there before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert "fields differs" not in refused(capsys, *export(tmp_path / "a", folder, "--top-k", 9))
    assert "export to an empty folder" in refused(capsys, *export(tmp_path / "a", folder, "--top-k", 4))


def test_an_export_that_stops_leaves_no_file_under_its_own_name(tmp_path: Path) -> None:
    targets = make_targets(tmp_path / "a")
    form = _StopsInside(ListColumns.to_write(targets.fields, VOCAB))
    with pytest.raises(KeyboardInterrupt):
        export_shards(targets, tmp_path / "files", form, range(4), fields=targets.fields)
    assert os.listdir(tmp_path / "files") == []


class _StopsInside(ListColumns):
    def __init__(self, form: ListColumns) -> None:
        super().__init__(fields=form.fields, vocab_size=form.vocab_size, present=form.present)

    def to_batch(self, rows: Any, targets: Targets) -> Any:
        raise KeyboardInterrupt


def test_an_import_that_stops_goes_on_with_the_shards_that_are_left(tmp_path: Path, tokenizer: Path) -> None:
    targets = make_targets(tmp_path / "a")
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    files = row_files([tmp_path / "files"], ("input_ids",))
    cache = Cache.open(tmp_path / "b", mode="r+")
    form = _StopsAt(list_columns(files[0].path, targets.fields, VOCAB), "shard-000003.parquet")
    plan = ImportPlan(
        corpus="docs", teacher="fake", identity=targets.identity, fields=targets.fields, encoding="f32",
        shard_positions=700,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        import_targets(cache, files, form, byte_tokenizer(), plan)
    committed = Cache.open(tmp_path / "b").targets("fake", "docs").committed
    assert committed.tolist() == [True] * 3 + [False]
    report = import_targets(cache, files, form.inner, byte_tokenizer(), plan)
    assert (report.shards_before, report.shards_written, report.corpus_made) == (3, 1, False)
    assert_same(everything(Cache.open(tmp_path / "b").targets("fake", "docs")), everything(targets))


class _StopsAt:
    """A format that is interrupted in one file once the rank table is made."""

    def __init__(self, inner: RowFormat, name: str) -> None:
        self.inner = inner
        self._name = name
        self.token_columns, self.target_columns = inner.token_columns, inner.target_columns
        self.file_name, self.schema, self.to_batch, self.rows = (
            inner.file_name,
            inner.schema,
            inner.to_batch,
            inner.rows,
        )

    def targets(self, batch: Any, place: Any) -> Targets:
        if place.path.name == self._name and batch.num_rows > 1:
            raise KeyboardInterrupt
        return self.inner.targets(batch, place)


def test_targets_that_are_not_all_there_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, corpus = make_small(tmp_path / "a")
    teacher = teacher_for(corpus)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=K), encoding="u8")
    if targets.pilot_rows():
        targets.make_ranks(scored(teacher, corpus, targets.pilot_rows(), targets.fields))
    rows = range(int(corpus.shard_rows[1]))
    assert targets.write_shard(0, scored(teacher, corpus, rows, targets.fields), teacher.provenance)
    line = refused(capsys, *export(tmp_path / "a", tmp_path / "files"))
    assert "3 of 4 shards have no targets of teacher 'fake' yet, the first is 1" in line
    assert not (tmp_path / "files").exists()
    assert run(*export(tmp_path / "a", tmp_path / "files", "--shards", ":1")) == 0
    for bad in ("0", "3:2", "0:5", "a:b", "2:2"):
        assert f"--shards {bad!r} must be A:B" in refused(capsys, *export(tmp_path / "a", "x", "--shards", bad))
    assert "--top-k is 9; it must be 1 to 8" in refused(capsys, *export(tmp_path / "a", "x", "--top-k", 9))
    assert "must be a local folder" in refused(capsys, *export(tmp_path / "a", "s3://bucket/x"))


# Files made elsewhere.


def foreign(path: Path, *, large: bool = False, **columns: Any) -> Path:
    """Three rows of five tokens with K=2, as another tool may write them; `columns` replaces some, by None none."""
    ids = [[[t % VOCAB, t % VOCAB + 1] for t in range(row * 5, row * 5 + 5)] for row in range(3)]
    made: dict[str, Any] = {
        "input_ids": [list(range(row * 5, row * 5 + 5)) for row in range(3)],
        "ids": ids,
        "logprobs": [[[-2.0, -0.5]] * 5 for _ in range(3)],
        **columns,
    }
    table = pa.table({name: values for name, values in made.items() if values is not None})
    if large:
        nested = {"ids": pa.large_list(pa.large_list(pa.int64())), "input_ids": pa.large_list(pa.int32())}
        table = pa.table({n: table[n].cast(nested.get(n, table[n].type)) for n in table.column_names})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return path


TEACHER = ("--model", "someone/model", "--vocab-size", VOCAB, "--encoding", "f32")


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


def test_rows_split_over_many_row_groups_and_files_come_back_in_order(tmp_path: Path, tokenizer: Path) -> None:
    targets = make_targets(tmp_path / "a")
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    table = pyarrow.dataset.dataset(tmp_path / "files", format="parquet").to_table()
    whole = tmp_path / "one.parquet"
    pq.write_table(table.replace_schema_metadata(None), whole, row_group_size=7)
    assert run(*take(whole, tmp_path / "b", tokenizer, *TEACHER, "--shard-positions", 333)) == 0
    back = Cache.open(tmp_path / "b").targets("fake", "docs")
    assert back.corpus.num_shards > targets.corpus.num_shards
    assert_same(replace(everything(back)), everything(targets))


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
