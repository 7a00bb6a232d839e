"""Documents from source files: text (one document a file), JSONL and Parquet (one a record)."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from potstill.cache.errors import InvalidInput

_TEXT = frozenset({".txt", ".md", ".rst", ".text"})
_JSONL = frozenset({".jsonl", ".ndjson"})
_PARQUET = frozenset({".parquet"})
_PIECE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to ingest, and the name that the corpus records for it (never an absolute path)."""

    path: Path
    name: str


def source_files(sources: Sequence[str | Path]) -> list[SourceFile]:
    """List the files meant by `sources`; a folder means every file of a known kind below it, in order of name.

    Raises:
        InvalidInput: a source does not exist, is of an unknown kind, or is a folder without any known file.
    """
    files: list[SourceFile] = []
    for source in map(Path, sources):
        if source.is_dir():
            known = (p for p in sorted(source.rglob("*")) if p.suffix.lower() in _TEXT | _JSONL | _PARQUET)
            inside = [p for p in known if p.is_file()]
            if not inside:
                raise InvalidInput(f"folder {str(source)!r} holds no .txt, .md, .rst, .jsonl or .parquet file")
            files.extend(SourceFile(p, str(p.relative_to(source))) for p in inside)
        elif source.is_file():
            if source.suffix.lower() not in _TEXT | _JSONL | _PARQUET:
                raise InvalidInput(f"{str(source)!r} is not .txt, .md, .rst, .jsonl or .parquet; rename or convert it")
            files.append(SourceFile(source, source.name))
        else:
            raise InvalidInput(f"source {str(source)!r} does not exist")
    return files


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def documents(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    """Read the documents of one file, in order, each as the pieces of its text; those of a text file are short.

    Raises:
        InvalidInput: bytes are not UTF-8, a line is not JSON, or a record has no text under `text_field`.
    """
    kind = path.suffix.lower()
    if kind in _PARQUET:
        yield from ((text,) for text in _parquet(path, text_field))
    elif kind in _JSONL:
        yield from ((text,) for text in _jsonl(path, text_field))
    else:
        yield _text(path)


def _text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        at = 0
        while data := file.read(_PIECE_BYTES):
            at -= len(decoder.getstate()[0])  # bytes of a character that the last piece began
            yield _decoded(decoder, data, str(path), at)
            at = file.tell()
        yield _decoded(decoder, b"", str(path), at - len(decoder.getstate()[0]))


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, where: str, at: int) -> str:
    """The text of the next bytes, which begin at byte `at`; no bytes are the end."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where} is not UTF-8: {error.reason} at byte {at + error.start}") from error


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_utf8(line, where))
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{where} is not JSON: {error}") from error
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise InvalidInput(f"{where} has no text under {text_field!r}; name the key with --text-field")
            yield _encodable(text, where)


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise InvalidInput(f"{path} has no column {text_field!r}; it has {names}: name one with --text-field")
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise InvalidInput(f"{path}: column {text_field!r} holds {text!r}, not text")
                    yield text
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as Parquet: {error}") from error


def _encodable(text: str, where: str) -> str:
    """Return the text if it can be UTF-8: JSON can spell half a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{where} has half a surrogate pair at character {error.start}") from error
    return text


def _utf8(data: bytes, where: str) -> str:
    """Decode UTF-8, without the byte order mark that some editors put in front."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
