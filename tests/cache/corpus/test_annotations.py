from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray

from potstill.cache.commands import annotate as command
from potstill.cache.corpus.annotations import annotate, open_annotation
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.row_values import read_row_values
from potstill.cache.errors import AlreadyExists, CorruptSegment, FormatError, InvalidInput, NotFound, SpecMismatch
from potstill.cache.store.root import Root
from potstill.cache.upkeep.integrity import check_cache
from tests.support.corpora import make_corpus

SOURCE = {"source": "a list of test sets", "tool": "exact match"}


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


def problems(root: Path) -> list[str]:
    return [problem for checked in check_cache(Root.open(root)) for problem in checked.problems]


def some_rows(corpus: Corpus, seed: int = 0) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(len(corpus)) < 0.3


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", ">i4", "float32", "float64"])
def test_values_of_every_kind_come_back_as_they_were(tmp_path: Path, dtype: str) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    values = (np.arange(len(corpus)) % 5).astype(dtype)
    made = annotate(cache.root, corpus.annotated, "contaminated", values, SOURCE)
    again = Corpus.open(cache.root, "docs")
    assert again.annotations() == ["contaminated"]
    kept = again.annotation("contaminated")
    assert kept.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(kept, values)
    assert open_annotation(cache.root, again.annotated, "contaminated") == made
    assert made.provenance == SOURCE


def test_a_stranger_reads_an_annotation_with_zarr_alone(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    values = some_rows(corpus)
    made = annotate(cache.root, corpus.annotated, "held-out", values, SOURCE)
    array = zarr.open_array(tmp_path / "c" / "corpora" / "docs" / "annotations" / made.group / "values", mode="r")
    assert np.array_equal(np.asarray(array[:]), values)


def test_a_sealed_annotation_is_never_rewritten(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    annotate(cache.root, corpus.annotated, "held-out", some_rows(corpus), SOURCE)
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    with pytest.raises(AlreadyExists, match="corpus 'docs' has an annotation 'held-out'"):
        annotate(cache.root, corpus.annotated, "held-out", some_rows(corpus, 1), SOURCE)
    assert before == {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3, bool), r"has values of shape \[3\], corpus 'docs' has [0-9]+ rows; give one value a row"),
        (np.zeros((2, 2)), r"has values of shape \[2, 2\]"),
        (None, "is complex128; take bool, int8 to int64"),
    ],
)
def test_values_that_are_not_one_a_row_are_refused_and_nothing_is_left(
    tmp_path: Path, values: NDArray[Any] | None, message: str
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    with pytest.raises(InvalidInput, match=message):
        annotate(cache.root, corpus.annotated, "a", np.zeros(len(corpus), complex) if values is None else values, {})
    assert not (tmp_path / "c" / "corpora" / "docs" / "annotations").exists()


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "a" * 52])
def test_a_hostile_name_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    with pytest.raises(InvalidInput, match="annotation name"):
        annotate(cache.root, corpus.annotated, name, some_rows(corpus), {})
    with pytest.raises(InvalidInput, match="annotation name"):
        corpus.annotation(name)


def test_the_annotation_of_another_corpus_or_name_is_refused(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    annotate(cache.root, corpus.annotated, "held-out", some_rows(corpus), SOURCE)
    folder = tmp_path / "c" / "corpora" / "docs" / "annotations"
    make_corpus(tmp_path / "other", texts=["another text"])
    shutil.copytree(folder, tmp_path / "other" / "corpora" / "docs" / "annotations")
    other = Corpus.open(Root.open(tmp_path / "other"), "docs")
    with pytest.raises(SpecMismatch, match="was made for a corpus of fingerprint"):
        other.annotation("held-out")
    assert "was made for a corpus of fingerprint" in problems(tmp_path / "other")[0]
    shutil.copy(folder / "held-out.json", folder / "contaminated.json")
    with pytest.raises(SpecMismatch, match="is the record of annotation 'held-out'"):
        corpus.annotation("contaminated")
    with pytest.raises(NotFound, match="no annotation 'x'; there are: contaminated, held-out"):
        corpus.annotation("x")


def test_damage_is_an_error_that_names_the_object(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    annotate(cache.root, corpus.annotated, "held-out", some_rows(corpus), SOURCE)
    assert problems(tmp_path / "c") == []
    stored = next((tmp_path / "c").rglob("values/c/0"))
    whole = stored.read_bytes()
    stored.write_bytes(whole[:8] + bytes([whole[8] ^ 1]) + whole[9:])
    with pytest.raises(CorruptSegment, match="values"):
        corpus.annotation("held-out")
    assert "values/c/0 has sha256" in problems(tmp_path / "c")[0]
    stored.write_bytes(whole[:-1])
    with pytest.raises(CorruptSegment, match="values/c/0 has"):
        corpus.annotation("held-out")
    record = tmp_path / "c" / "corpora" / "docs" / "annotations" / "held-out.json"
    record.write_text("{}")
    with pytest.raises(FormatError, match="held-out.json was not written by potstill"):
        corpus.annotation("held-out")


def test_the_command_takes_npy_text_and_parquet_and_lists_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, corpus = make_corpus(tmp_path / "c")
    root, flags = str(tmp_path / "c"), some_rows(corpus)
    assert run(root, "--corpus", "docs") == 0
    assert "has no annotation" in capsys.readouterr().out
    np.save(tmp_path / "flags.npy", flags)
    (tmp_path / "flags.txt").write_text("".join(f"{str(flag).lower()}\n" for flag in flags.tolist()))
    table = pa.table({"flag": flags, "score": np.linspace(-1, 1, len(flags))})
    pq.write_table(table, tmp_path / "all.parquet")
    for number, file in enumerate(("flags.npy", "flags.txt")):
        values = str(tmp_path / file)
        run(root, "--corpus", "docs", "--name", f"from-{number}", "--values", values, "--source", "by hand")
        assert np.array_equal(corpus.annotation(f"from-{number}"), flags)
    of_parquet = ("--values", str(tmp_path / "all.parquet"), "--column")
    run(root, "--corpus", "docs", "--name", "flag", *of_parquet, "flag")
    run(root, "--corpus", "docs", "--name", "score", *of_parquet, "score")
    assert np.array_equal(corpus.annotation("flag"), flags)
    capsys.readouterr()
    assert run(root, "--corpus", "docs") == 0
    out = capsys.readouterr().out.splitlines()
    count = int(flags.sum())
    assert out[0] == f"flag  bool  {count:,} of {len(flags):,} rows true  (all.parquet)"
    assert out[1] == f"from-0  bool  {count:,} of {len(flags):,} rows true  (by hand)"
    assert out[3].startswith("score  float64  ")
    assert "from -1.0 to 1.0" in out[3]


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [("1\n0\n3\n", "int64"), ("1\n0.5\nnan", "float64"), ("True\r\nfalse\r\n", "bool"), ("-9\n9000000000\n", "int64")],
)
def test_text_is_of_the_narrowest_kind_that_holds_every_line(tmp_path: Path, lines: str, dtype: str) -> None:
    (tmp_path / "v.txt").write_text(lines)
    values = read_row_values(tmp_path / "v.txt")
    assert values.dtype == dtype
    assert len(values) == len(lines.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", b"1\nyes\n", r"v\.txt:2 is 'yes'; one number, or true or false, a line"),
        ("v.txt", b"true\n1\n", r"v\.txt:1 is 'true'"),
        ("v.txt", b"1\n\n2\n", r"v\.txt:2 is ''"),
        ("v.txt", b"1\n9223372036854775808\n", r"v\.txt:2 is 9223372036854775808; whole numbers go from -2\^63"),
        ("v.txt", b"\xff", r"v\.txt is not UTF-8"),
        ("v.npy", b"\x93NUMPY", "cannot be read as an array"),
        ("v.parquet", b"PAR1", "cannot be read as Parquet"),
        ("v.csv", b"1", "is not .npy, .txt or .parquet"),
    ],
)
def test_a_bad_file_of_values_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_row_values(tmp_path / name)


def test_an_array_that_would_run_code_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InvalidInput, match="cannot be read as an array"):
        read_row_values(tmp_path / "v.npy")


def test_a_parquet_column_has_to_be_there_and_whole(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, None], "b": ["x", "y"]}), tmp_path / "v.parquet")
    with pytest.raises(InvalidInput, match="has several columns; it has a, b: name one with --column"):
        read_row_values(tmp_path / "v.parquet")
    with pytest.raises(InvalidInput, match="has no column 'c'"):
        read_row_values(tmp_path / "v.parquet", "c")
    with pytest.raises(InvalidInput, match="column 'a' has 1 nulls"):
        read_row_values(tmp_path / "v.parquet", "a")
    with pytest.raises(InvalidInput, match="give one bool, int or float a row"):
        read_row_values(tmp_path / "v.parquet", "b")
    with pytest.raises(InvalidInput, match="there is no file"):
        read_row_values(tmp_path / "none.npy")


def test_the_command_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c")
    with pytest.raises(InvalidInput, match="--source without --values FILE"):
        run(str(tmp_path / "c"), "--corpus", "docs", "--name", "a", "--source", "x")
    with pytest.raises(InvalidInput, match="needs the annotation's name"):
        run(str(tmp_path / "c"), "--corpus", "docs", "--values", "x.npy")
