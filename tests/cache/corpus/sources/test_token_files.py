"""Files of token ids, as nanoGPT, modded-nanogpt and Megatron write them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache.corpus.sources import BadRecords, Field, Ids, documents, list_sources
from potstill.cache.errors import InvalidInput

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 9, 9, 9, 0]]
FLAT = [token for document in DOCUMENTS for token in document]


def read(path: Path, *, vocab_size: int = 50257, eos: int | None = 0) -> list[list[int]]:
    field = Field()
    ((file,), _) = list_sources([path], field)
    found: list[list[int]] = []
    for document in documents(file, field, BadRecords(skip=False), vocab_size=vocab_size, eos=eos):
        assert isinstance(document, Ids)
        found.append([token for block in document.blocks for token in block.tolist()])
    return found


@pytest.mark.parametrize(("kind", "vocab_size"), [("<u2", 65536), ("<u4", 65537)])
def test_raw_files_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, kind: str, vocab_size: int) -> None:
    path = tmp_path / "train.bin"
    np.array(FLAT, kind).tofile(path)
    assert read(path, vocab_size=vocab_size) == DOCUMENTS
    assert read(path, vocab_size=vocab_size, eos=None) == [FLAT]
    assert read(path, vocab_size=vocab_size, eos=1) == [FLAT]
    np.array(FLAT[:-2], kind).tofile(path)
    assert read(path, vocab_size=vocab_size) == [*DOCUMENTS[:2], [9, 9, 9]]


def test_documents_that_begin_with_the_end_of_text_are_parted_before_it(tmp_path: Path) -> None:
    np.array([0, 5, 6, 0, 0, 7], "<u2").tofile(tmp_path / "a.bin")
    assert read(tmp_path / "a.bin") == [[0, 5, 6], [0], [0, 7]]


@pytest.mark.parametrize(("magic", "version", "kind"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_a_header_says_how_wide_the_tokens_are(tmp_path: Path, magic: int, version: int, kind: str) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(FLAT)
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(header.tobytes() + np.array(FLAT, kind).tobytes())
    assert read(path) == DOCUMENTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="and its header tells of 11 tokens; fetch it again"):
        read(path)


def test_an_odd_size_and_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\1\0\2")
    with pytest.raises(InvalidInput, match="has 3 bytes, which are no whole uint16 token ids"):
        read(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"")
    assert read(tmp_path / "a.bin") == []


def write_megatron(path: Path, sequences: list[list[int]], starts: list[int], kind: str, code: int) -> None:
    """Write as Megatron-LM's `IndexedDatasetBuilder` does."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(kind).itemsize
    path.write_bytes(b"".join(np.array(sequence, kind).tobytes() for sequence in sequences))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(starts))
    arrays: list[Any] = [lengths, pointers.astype(np.int64), np.array(starts, np.int64)]
    path.with_suffix(".idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


@pytest.mark.parametrize(("kind", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5), ("u1", 1)])
def test_documents_of_megatron_are_those_of_its_index(tmp_path: Path, kind: str, code: int) -> None:
    path = tmp_path / "text_document.bin"
    write_megatron(path, DOCUMENTS, [0, 1, 3], kind, code)
    assert read(path) == [DOCUMENTS[0], DOCUMENTS[1] + DOCUMENTS[2]]
    assert [file.name for file in list_sources([tmp_path], Field())[0]] == ["text_document.bin"]


def test_a_wrong_index_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_megatron(path, DOCUMENTS, [0, 1, 3], "<f4", 6)
    with pytest.raises(InvalidInput, match="has version 1 and type 6; version 1 and integer types"):
        read(path)
    write_megatron(path, DOCUMENTS, [0, 1, 4], "<u2", 8)
    with pytest.raises(InvalidInput, match="is no index of Megatron's"):
        read(path)
    write_megatron(path, DOCUMENTS, [0, 1, 3], "<u2", 8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="tells of tokens outside the 21 bytes of a.bin"):
        read(path)
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00 cut")
    with pytest.raises(InvalidInput, match="is no index of Megatron's"):
        read(path)
