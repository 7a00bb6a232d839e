"""DistillKit's format against what DistillKit itself wrote and read (tests/golden/distillkit/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from potstill.cache import Cache
from potstill.cache.errors import FormatError, InvalidInput
from potstill.cache.interchange.distillkit import CompressedRows
from potstill.cache.interchange.distillkit_codec import compress, decompress, index_bits, logprob_bytes, pack, unpack
from potstill.cache.interchange.distillkit_config import (
    CompressionConfig,
    ResidualBin,
    config_from_mapping,
    config_to_mapping,
    read_config,
)
from tests.support.command_line import refused, run
from tests.support.paths import GOLDEN

DISTILLKIT = GOLDEN / "distillkit"
CONFIG = DISTILLKIT / "dataset" / "compression_config.yaml"
CONFIGS: dict[str, dict[str, Any]] = json.loads((DISTILLKIT / "codec.json").read_text())
WITHOUT_FIT = [name for name, config in CONFIGS.items() if not config["polynomial_terms"]]
VOCAB = 300


def golden(name: str) -> tuple[CompressionConfig, dict[str, NDArray[Any]]]:
    with np.load(DISTILLKIT / "codec.npz") as data:
        arrays = {key.rpartition("/")[2]: data[key] for key in data.files if key.startswith(f"{name}/")}
        return config_from_mapping(CONFIGS[name]), {**arrays, "ids": data["ids"], "logprobs": data["logprobs"]}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel(vocab={f"t{number}": number for number in range(VOCAB)}, unk_token="t0"))
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_distillkit_decode_to_what_it_decodes_them_to(name: str) -> None:
    config, found = golden(name)
    decoded = decompress(found["compressed_logprobs"], config)
    np.testing.assert_allclose(decoded, found["decoded_logprobs"], rtol=1e-6, atol=2e-5)
    ids = unpack(found["bytepacked_indices"], index_bits(config), config.k)
    np.testing.assert_array_equal(ids, found["decoded_ids"])


@pytest.mark.parametrize("name", CONFIGS)
def test_its_ids_are_packed_as_it_packs_them(name: str) -> None:
    config, found = golden(name)
    np.testing.assert_array_equal(pack(found["decoded_ids"], index_bits(config)), found["bytepacked_indices"])


@pytest.mark.parametrize("name", WITHOUT_FIT)
def test_without_a_fit_the_same_logprobs_make_the_same_bytes(name: str) -> None:
    config, found = golden(name)
    made = compress(found["logprobs"][:, : config.k], config)
    np.testing.assert_array_equal(made, found["compressed_logprobs"])


def test_what_it_decoded_is_encoded_to_its_own_bytes_again() -> None:
    """Numbers that are kept exactly; a bin's scale follows from what is lost."""
    config, found = golden("exact_only")
    np.testing.assert_array_equal(compress(found["decoded_logprobs"], config), found["compressed_logprobs"])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in WITHOUT_FIT])
def test_a_fit_of_ours_is_as_close_as_its_own(name: str) -> None:
    config, found = golden(name)
    exact = found["logprobs"][:, : config.k]
    ours = np.abs(decompress(compress(exact, config), config) - exact).mean()
    theirs = np.abs(found["decoded_logprobs"] - exact).mean()
    assert ours <= theirs * 1.001


def test_its_recommended_config_loses_nats_in_its_own_fit_and_hardly_any_in_ours() -> None:
    config, found = golden("recommended")
    exact = found["logprobs"][:, : config.k]
    assert np.abs(found["decoded_logprobs"] - exact).mean() > 1
    assert np.abs(decompress(compress(exact, config), config) - exact).mean() < 0.05


@given(bits=st.integers(1, 32), rows=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=7, max_size=7), min_size=1))
def test_packed_numbers_come_back(bits: int, rows: list[list[int]]) -> None:
    numbers = np.array(rows, np.int64) & ((1 << bits) - 1)
    packed = pack(numbers, bits)
    assert packed.shape[1] == -(-7 * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, 7), numbers)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    exact_k=st.integers(0, 12),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    bits=st.integers(8, 12),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_any_config_keeps_logprobs_within_what_its_bins_can(
    seed: int, exact_k: int, dtype: str, bits: int, flags: tuple[bool, bool]
) -> None:
    k = 16
    config = CompressionConfig(
        d=1000, k=k, exact_k=exact_k, exact_dtype=dtype, delta_encoding=flags[0], error_diffusion=flags[1],
        bins=(ResidualBin(scale_dtype="float32", element_bits=bits, num_elements=k - exact_k),),
    )  # fmt: skip
    gaps = np.random.default_rng(seed).exponential(0.4, (5, k)).astype(np.float32)
    logprobs = -np.cumsum(gaps, axis=1)
    data = compress(logprobs, config)
    assert data.shape == (5, logprob_bytes(config))
    largest = np.abs(logprobs).max()
    relative = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-20, "float64": 2**-20}[dtype]
    allowed = k * largest * (2.0**-bits + relative) + 2 * largest * 2.0 ** -(bits - 1)
    assert np.abs(decompress(data, config) - logprobs).max() <= allowed


def test_its_dataset_is_imported_with_what_it_leaves_out_filled_in(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cache", tmp_path / "c", "--corpus", "docs", "--teacher", "theirs", "--tokenizer", tokenizer]
    more = ["--format", "distillkit", "--model", "someone/model", "--encoding", "f32"]
    assert run("import", DISTILLKIT / "dataset", *where, *more) == 0, capsys.readouterr().err
    found = Cache.open(tmp_path / "c").targets("theirs", "docs")
    assert (found.identity.model, found.identity.vocab_size, found.fields.k) == ("someone/model", VOCAB, 24)
    with np.load(DISTILLKIT / "dataset" / "decoded.npz") as decoded:
        for row, targets in enumerate(found.read_rows(range(5))):
            tokens, ids, logprobs = (decoded[f"{row}/{name}"] for name in ("tokens", "ids", "logprobs"))
            assert found.corpus.row(row).tolist() == tokens[:-1].tolist(), "the last token has no target"
            order = np.argsort(-logprobs, axis=1, kind="stable")
            kept = np.take_along_axis(logprobs, order, axis=1).astype(np.float64)
            mass = np.exp(kept).sum(axis=1)
            np.testing.assert_allclose(targets.logprobs, kept - np.log(np.maximum(mass, 1))[:, None], atol=1e-5)
            np.testing.assert_array_equal(targets.ids, np.take_along_axis(ids, order, axis=1))
            np.testing.assert_allclose(np.exp(targets.log_tail), np.maximum(1 - mass, 0), atol=1e-6)
            labels = [
                targets.logprobs[t][targets.ids[t] == tokens[t + 1]] if t < len(tokens) - 2 else []
                for t in range(len(tokens) - 1)
            ]
            expected = [label[0] if len(label) else np.nan for label in labels]
            np.testing.assert_array_equal(targets.label_logprob, np.array(expected, np.float32))


def test_targets_exported_to_distillkit_come_back_within_its_error(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--cache", tmp_path / "a", "--corpus", "docs", "--teacher", "t", "--tokenizer", tokenizer]
    more = ["--format", "distillkit", "--model", "someone/model", "--encoding", "f32"]
    assert run("import", DISTILLKIT / "dataset", *first, *more) == 0
    out = ["export", tmp_path / "a", "--corpus", "docs", "--teacher", "t", "--to", tmp_path / "files"]
    assert run(*out, "--format", "distillkit") == 0
    schema = pq.read_schema(tmp_path / "files" / "data_0.parquet")
    theirs = pq.read_schema(DISTILLKIT / "dataset" / "data_0.parquet")
    assert schema.remove_metadata().equals(theirs.remove_metadata())
    assert read_config(tmp_path / "files" / "compression_config.yaml").normalize_t
    second = ["--cache", tmp_path / "b", "--corpus", "docs", "--teacher", "t", "--tokenizer", tokenizer]
    assert run("import", tmp_path / "files", *second, "--format", "distillkit", "--encoding", "f32") == 0
    a, b = (Cache.open(tmp_path / name).targets("t", "docs") for name in ("a", "b"))
    assert a.identity == b.identity, "kept in the schema metadata, which DistillKit ignores"
    exact, back = (each.read(0, each.corpus.num_positions) for each in (a, b))
    same = [exact.logprobs[p][np.argsort(exact.ids[p])] for p in range(exact.num_positions)]
    read = [back.logprobs[p][np.argsort(back.ids[p])] for p in range(back.num_positions)]
    np.testing.assert_array_equal(np.sort(exact.ids), np.sort(back.ids))
    assert np.abs(np.array(same) - np.array(read)).mean() < 0.05
    assert "config; export to an empty folder" in refused(
        capsys,
        *out,
        "--format",
        "distillkit",
        "--compression-config",
        CONFIG,
    )


def bad(folder: Path, **columns: Any) -> Path:
    """Their dataset with some columns replaced, or left out when None."""
    table = pq.read_table(DISTILLKIT / "dataset" / "data_0.parquet")
    for name, change in columns.items():
        place = table.column_names.index(name)
        values = None if change is None else change(table[name].to_pylist())
        table = table.remove_column(place) if values is None else table.set_column(place, name, pa.array(values))
    folder.mkdir()
    pq.write_table(table, folder / "bad.parquet")
    (folder / "compression_config.yaml").write_bytes((CONFIG).read_bytes())
    return folder / "bad.parquet"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"bytepacked_indices": None}, "has no column 'bytepacked_indices'"),
        ({"input_ids": lambda rows: [[*row, 1] for row in rows]}, "row 0: 10 tokens and 8 targets"),
        ({"input_ids": lambda rows: [*rows[:2], [300] * 12]}, "row 2: id 300 is outside the vocabulary of 300"),
        (
            {"compressed_logprobs": lambda rows: [rows[0], [row[:-1] for row in rows[1]], rows[2]]},
            "row 1: 'compressed_logprobs' has 27 bytes at a position, its compression config means 28",
        ),
        ({"compressed_logprobs": lambda rows: [rows[0], [[255] * 28] * 4, rows[2]]}, "row 1: 'compressed_logprobs' de"),
        ({"bytepacked_indices": lambda rows: [rows[0], [[255] * 27] * 4, rows[2]]}, "row 1: id 511 is outside the voc"),
        ({"bytepacked_indices": lambda rows: [rows[0], rows[1], [[0] * 27] * 11]}, "row 2: 'bytepacked_indices' has a"),
        ({"bytepacked_indices": lambda rows: [rows[0], rows[1][:-1], rows[2]]}, "row 1: 'bytepacked_indices' has 3 po"),
    ],
)  # fmt: skip
def test_bad_datasets_are_refused_in_one_line_that_names_file_and_row(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], line: str
) -> None:
    file = bad(tmp_path / "files", **columns)
    where = ["--cache", tmp_path / "c", "--corpus", "docs", "--teacher", "t", "--tokenizer", tokenizer]
    said = refused(capsys, "import", file, *where, "--format", "distillkit", "--model", "m")
    assert said.startswith(f"invalid_input: {file}")
    assert line in said


def test_legacy_rows_and_configs_are_refused_with_the_reason(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").mkdir()
    table = pa.table({"input_ids": [[1, 2]], "packed_indices": [[[1], [2]]], "exact_values": [[[0.1], [0.1]]]})
    pq.write_table(table, tmp_path / "files" / "a.parquet")
    where = ["--cache", tmp_path / "c", "--corpus", "docs", "--teacher", "t", "--tokenizer", tokenizer]
    arguments = ["import", tmp_path / "files", *where, "--format", "distillkit", "--model", "m"]
    assert "there is no compression_config.yaml beside" in refused(capsys, *arguments)
    config = tmp_path / "config.yaml"
    config.write_text("teacher: {logprob_compressor: {d: 300, k: 4, exact_k: 4, residual_bins: []}}")
    assert "legacy rows: logits without" in refused(capsys, *arguments, "--compression-config", config)
    config.write_text("{k: 4, exact_k: 2, polynomial_degree: 3, vocab_size: 300}")
    assert "legacy format, which keeps logits" in refused(capsys, *arguments, "--compression-config", config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_from_its_own_names(name: str) -> None:
    config = config_from_mapping(CONFIGS[name])
    assert config_from_mapping(config_to_mapping(config)) == config
    assert config_from_mapping({"teacher": {"logprob_compressor": CONFIGS[name]}}) == config
    assert set(config_to_mapping(config)) == set(CONFIGS[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k is 0; it must be a whole number from 1"),
        ({"exact_k": 200}, "exact_k is 200; it must be a whole number from 0 to 128"),
        ({"exact_dtype": "int8"}, "exact_dtype is 'int8'; it must be one of float16"),
        ({"polynomial_terms": [0, "log"]}, "polynomial_terms has 'log'"),
        ({"polynomial_terms": None}, "there are no polynomial_terms and no residual_bins"),
        ({"residual_bins": [{"scale_dtype": "float32", "element_bits": 4, "num_elements": 200}]}, "more elements"),
        ({"residual_bins": [{"bits": 4}]}, "residual_bins cannot be read"),
        ({"polynomial_terms": 5}, "polynomial_terms is 5; it must be a list"),
        ({"delta_encoding": "yes"}, "delta_encoding is 'yes'; it must be true or false"),
        ({"codebook": 3}, "a compression config has no key 'codebook'"),
    ],
)
def test_a_config_without_meaning_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words.replace("[", r"\[")):
        config_from_mapping({**CONFIGS["recommended"], **change})


def test_terms_that_overflow_are_refused() -> None:
    config = replace(config_from_mapping(CONFIGS["recommended"]), polynomial_terms=(0, "exp"))
    with pytest.raises(FormatError, match="are not finite"):
        compress(np.zeros((1, 128), np.float32), config)


def test_a_rank_that_was_not_reported_gets_a_free_id_and_no_mass(tmp_path: Path) -> None:
    config = CompressionConfig(d=8, k=3, exact_k=3)
    form = CompressedRows(config, 8)
    logprobs = np.array([[-0.1, -np.inf, -3.0]], np.float32)
    ids = np.array([[0, 7, 1]])
    data = {
        "input_ids": [[4]],
        "compressed_logprobs": [np.diff(logprobs, prepend=0).astype("<f4").view(np.uint8).reshape(1, -1).tolist()],
        "bytepacked_indices": [pack(ids, 3).tolist()],
    }
    from potstill.cache.interchange.formats import RowSource

    data["compressed_logprobs"] = [logprobs.astype("<f4").view(np.uint8).reshape(1, -1).tolist()]
    form = CompressedRows(replace(config, delta_encoding=False), 8)
    targets = form.targets(pa.record_batch(data), RowSource(tmp_path / "x", 0))
    assert targets.ids.tolist() == [[0, 1, 2]]
    assert targets.logprobs[0, 2] == -np.inf
