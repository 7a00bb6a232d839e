"""Documents of text files and of JSON: lines, an array of records, or one record."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from potstill.cache.corpus.sources.completions import completion
from potstill.cache.corpus.sources.documents import BadRecord, BadRecords, Document, Field
from potstill.cache.corpus.sources.files import SourceFile
from potstill.cache.corpus.sources.opening import MOST_RECORD_BYTES, opened
from potstill.cache.corpus.sources.records import document, others
from potstill.cache.errors import InvalidInput, LimitExceeded

TO_UTF8 = "convert it, as by iconv -f LATIN1 -t UTF-8"
_PIECE_BYTES = 1 << 18
_SPACE = " \t\r\n"


def text_pieces(file: SourceFile) -> Iterator[str]:
    """Read a text file in pieces that part no character.

    Raises:
        BadRecord: bytes are not UTF-8. InvalidInput: it cannot be unpacked.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with opened(file) as data:
        at = read = 0
        while block := data.read(_PIECE_BYTES):
            at = read - len(decoder.getstate()[0])  # bytes of a character that the last piece began
            yield _decoded(decoder, block, str(file.path), at)
            read += len(block)
        yield _decoded(decoder, b"", str(file.path), read - len(decoder.getstate()[0]))


def json_lines(file: SourceFile, field: Field, bad: BadRecords) -> Iterator[Document]:
    """Read one record a line; empty lines are none."""
    with opened(file) as data:
        for number, line in enumerate(_lines(data, str(file.path)), start=1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                yield _document(_parsed(line, where), field, where)
            except BadRecord as error:
                bad.add(str(error))


def json_records(file: SourceFile, field: Field, bad: BadRecords) -> Iterator[Document]:
    """Read a `.json` file: an array of records, one record, or lines as of a `.jsonl` file.

    Raises:
        InvalidInput: it is not JSON, which also `--skip-bad` cannot mend, as no line says where the next record begins.
        LimitExceeded: a record is too large.
    """
    if _is_lines(file):
        yield from json_lines(file, field, bad)
        return
    for number, record in enumerate(_records(file)):
        where = f"{file.path}: record {number}"
        try:
            found = _document(record, field, where)
        except BadRecord as error:
            bad.add(str(error))
        else:
            yield found


def _document(record: Any, field: Field, where: str) -> Document:
    if field.kind == "completion":
        return completion(record, field, where)
    if not isinstance(record, dict):
        raise BadRecord(f"{where} is no object with a key {field.name!r}")
    if field.name not in record:
        raise BadRecord(f"{where} has no {field.kind} under {field.name!r}; {others(record, field)}")
    return document(record[field.name], field, where, record)


def _lines(data: BinaryIO, where: str) -> Iterator[bytes]:
    number = 0
    while line := data.readline(MOST_RECORD_BYTES + 1):
        number += 1
        if len(line) > MOST_RECORD_BYTES:
            raise _too_large(f"{where}:{number}")
        yield line


def _too_large(where: str) -> LimitExceeded:
    return LimitExceeded(f"{where} has over {MOST_RECORD_BYTES >> 20} MiB in one record; part it, or write it as text")


def _parsed(line: bytes, where: str) -> Any:
    try:
        # Without the byte order mark that some editors put in front.
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where} is not JSON: {error}") from error


def _is_lines(file: SourceFile) -> bool:
    """Tell whether the first line is a whole record."""
    with opened(file) as data:
        # An array may be one line of any length, of which only the beginning is read.
        while (begin := data.readline(_PIECE_BYTES)) and not begin.strip():
            pass
        if not begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return False
        rest = b"" if begin.endswith(b"\n") else data.readline(MOST_RECORD_BYTES)
        try:
            return isinstance(_parsed(begin + rest, ""), dict)
        except BadRecord:
            return False


def _records(file: SourceFile) -> Iterator[Any]:
    """The elements of an array, or the values that stand one after the other, parsed one at a time."""
    text = _Growing(text_pieces(file), str(file.path))
    if text.next_character() != "[":
        while text.next_character():
            yield text.value()
        return
    follows = text.take()
    while text.next_character() != "]" or follows == ",":
        yield text.value()
        if (follows := text.next_character()) not in {",", "]"}:
            wrong = "no comma between records" if follows else "an array without an end"
            raise InvalidInput(f"{file.path} is not JSON: {wrong}")
        if follows == ",":
            text.take()
    text.take()
    if text.next_character():
        raise InvalidInput(f"{file.path} is not JSON: there is more after its array")


class _Growing:
    """Text of which more is read when a value does not end in what there is."""

    def __init__(self, pieces: Iterator[str], where: str) -> None:
        self._pieces = pieces
        self._where = where
        self._text = ""
        self._at = 0

    def next_character(self) -> str:
        """Skip white space; the next character, which is not taken, or none at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._grow(1):
                return ""

    def take(self) -> str:
        """Take the next character, which was looked at."""
        self._at += 1
        return self._text[self._at - 1]

    def value(self) -> Any:
        """Parse the next value."""
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # Twice as much each time, so that a long record is not parsed as often as it has pieces.
                if isinstance(error, RecursionError) or not self._grow(len(self._text) - self._at):
                    raise InvalidInput(f"{self._where} is not JSON: {error}") from error
            else:
                # A number may go on behind the text that there is.
                if end < len(self._text) or not self._grow(1):
                    self._at = end
                    return found

    def _grow(self, least: int) -> bool:
        """Read at least so many characters more if there are; False at the end."""
        parts, size = [self._text[self._at :]], 0
        try:
            while size < least and (piece := next(self._pieces, "")):
                parts.append(piece)
                size += len(piece)
        except BadRecord as error:
            raise InvalidInput(f"{error}; {TO_UTF8}, or take it out") from error
        if sum(map(len, parts)) > MOST_RECORD_BYTES:
            raise _too_large(self._where)
        self._text, self._at = "".join(parts), 0
        return size > 0


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, where: str, at: int) -> str:
    """The text of the next bytes, which begin at byte `at`; no bytes are the end."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where} is not UTF-8: {error.reason} at byte {at + error.start}") from error
