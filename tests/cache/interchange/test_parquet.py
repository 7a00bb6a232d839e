from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.interchange.formats import RowFormat, export_shards
from potstill.cache.interchange.importing import ImportPlan, import_targets
from potstill.cache.interchange.parquet import ListColumns, list_columns
from potstill.cache.interchange.row_files import row_files
from tests.support.command_line import refused, run
from tests.support.corpora import VOCAB, byte_tokenizer, teacher_for
from tests.support.parquet_files import TEACHER, K, everything, export, fill_all, make_small, make_targets, scored, take
from tests.support.scored_rows import assert_same

EVERYTHING = Fields(k=K, draws=20, seed=3, entropy=True, temperatures=(2.0, 4.0), dense=True)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("fields", "encoding"),
    [
        (Fields(k=K), "u8"),
        (EVERYTHING, "u8"),
        (EVERYTHING, "f32"),
        (Fields(k=0, draws=5), "f32"),
        (Fields(k=0, entropy=True), "u8"),
    ],
)
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


def test_documents_and_mask_come_back_from_parquet(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache.open(tmp_path / "a", mode="r+")
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, VOCAB, length, np.uint32) for length in rng.integers(1, 40, 60)]
    rows = [SourceRow(row, taught=rng.random(len(row)) < 0.5, ends_document=rng.random() < 0.3) for row in tokens]
    plan = IngestPlan(row_tokens=max(map(len, tokens)), shard_positions=700)
    corpus = ingest_rows(cache.root, "docs", rows, byte_tokenizer(), plan)
    teacher = teacher_for(corpus)
    fill_all(cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=K), encoding="f32"), teacher)
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    table = pyarrow.dataset.dataset(tmp_path / "files", format="parquet").to_table().to_pylist()
    assert [row["loss_mask"] for row in table] == [mask.tolist() for mask in corpus.take_loss_mask(range(60))]
    again = take(tmp_path / "files", tmp_path / "b", tokenizer, "--encoding", "f32", "--shard-positions", 700)
    assert run(*again) == 0, capsys.readouterr().err
    back = Cache.open(tmp_path / "b").corpus("docs")
    assert back.fingerprint == corpus.fingerprint
    assert back.document_rows.tolist() == corpus.document_rows.tolist()
    assert np.array_equal(back.loss_mask(0, back.num_positions), corpus.loss_mask(0, corpus.num_positions))
    capsys.readouterr()
    assert run(*export(tmp_path / "a", tmp_path / "kit"), "--format", "distillkit", "--top-k", 4) == 0
    assert "; the loss mask is left out: DistillKit has none" in capsys.readouterr().out


def test_a_loss_mask_is_not_lost_where_a_file_or_the_corpus_lacks_it(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache.open(tmp_path / "a", mode="r+")
    tokens = [np.arange(1, 21, dtype=np.uint32)] * 20
    plan = IngestPlan(row_tokens=20, shard_positions=100)
    rows = [SourceRow(row, taught=row > 10, ends_document=True) for row in tokens]
    corpus = ingest_rows(cache.root, "docs", rows, byte_tokenizer(), plan)
    teacher = teacher_for(corpus)
    fill_all(cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=K), encoding="f32"), teacher)
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    bare = ingest_rows(Cache.open(tmp_path / "b", mode="r+").root, "docs", tokens, byte_tokenizer(), plan)
    assert not bare.has_loss_mask
    again = take(tmp_path / "files", tmp_path / "b", tokenizer, "--encoding", "f32")
    assert "row 0 has another loss mask than row 0 of corpus 'docs'" in refused(capsys, *again)
    for lacking in ("shard-000000.parquet", "shard-000002.parquet"):
        folder = tmp_path / lacking
        shutil.copytree(tmp_path / "files", folder)
        pq.write_table(pq.read_table(folder / lacking).drop_columns(["loss_mask"]), folder / lacking)
        told = refused(capsys, *take(folder, tmp_path / "c", tokenizer, "--encoding", "f32"))
        assert "has a column 'loss_mask', and " in told
        assert f"{lacking} has none" in told


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
    assert "1 file written, 3 there before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert "fields differs" not in refused(capsys, *export(tmp_path / "a", folder, "--top-k", 9))
    assert "export to an empty folder" in refused(capsys, *export(tmp_path / "a", folder, "--top-k", 4))


def test_an_export_that_stops_leaves_no_file_under_its_own_name(tmp_path: Path) -> None:
    targets = make_targets(tmp_path / "a")
    form = _StopsInside(ListColumns.to_write(targets.fields, VOCAB, targets.corpus))
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
    assert "teacher 'fake' lacks 3 of 4 shards, the first is 1" in line
    assert not (tmp_path / "files").exists()
    assert run(*export(tmp_path / "a", tmp_path / "files", "--shards", ":1")) == 0
    for bad in ("0", "3:2", "0:5", "a:b", "2:2"):
        assert f"--shards {bad!r} must be A:B" in refused(capsys, *export(tmp_path / "a", "x", "--shards", bad))
    assert "--top-k is 9; it must be 1 to 8" in refused(capsys, *export(tmp_path / "a", "x", "--top-k", 9))
    assert "must be a local folder" in refused(capsys, *export(tmp_path / "a", "s3://bucket/x"))


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
