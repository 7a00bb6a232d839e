"""Filter: documents of files in, records of those that are kept out, as JSON lines that are ingested as they are.

Each document goes through: copies of earlier ones, language, rules, near copies of what was kept. Memory holds a batch
of documents, and 180 bytes of each one that went by.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.seal import Source
from potstill.cache.corpus.sources import BadRecords, Field, SourceFile, Text, documents, file_sha256, list_sources
from potstill.cache.errors import AlreadyExists, InvalidInput, LimitExceeded
from potstill.cache.plurals import counted
from potstill.cache.store.root import store_errors
from potstill.cache.text.duplicates import ExactCopies, NearCopies
from potstill.cache.text.filter_report import FilterCounts, write_report
from potstill.cache.text.known_hashes import NONE
from potstill.cache.text.language import language_of, stop_words
from potstill.cache.text.measures import measures
from potstill.cache.text.parts import PART_BYTES, Parts
from potstill.cache.text.rules import FilterPlan
from potstill.cache.text.words import normalised, word_hashes

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 22
MOST_CHARACTERS = 1 << 26
"""Most characters of one document, which is measured as a whole."""


@dataclass(frozen=True, slots=True)
class FilterProgress:
    """Files read, of how many, documents read and kept, and characters read."""

    files_done: int
    files: int
    documents: int
    kept: int
    characters: int


@dataclass(frozen=True, slots=True)
class _Read:
    """A document with its text as a whole, and the record to write."""

    where: str
    text: str
    record: dict[str, Any]


def filter_files(
    sources: Sequence[str | Path],
    out: Path,
    plan: FilterPlan,
    *,
    text_field: str = "text",
    skip_bad: bool = False,
    skip_unknown: bool = False,
    part_bytes: int = PART_BYTES,
    on_progress: Callable[[FilterProgress], None] = lambda _: None,
) -> FilterCounts:
    """Write the records that a plan keeps, and a report, to the new folder `out`, which is there when all is done.

    A text file becomes a record with its text and its name, as `source`.

    Raises:
        AlreadyExists: there is something in `out`.
        InvalidInput: a source is bad or has `out` in it, or nothing is kept.
        LimitExceeded: a document is too long. StoreError: the disk is full. In all cases nothing is left behind.
    """
    _require_outside(out, sources)
    field = Field("text", text_field, whole=True)
    files, unknown = list_sources(sources, field, skip_unknown=skip_unknown)
    if tokens := [file.path for file in files if file.kind == "tokens"]:
        raise InvalidInput(f"{str(tokens[0])!r} holds token ids, and a filter reads text; leave it out")
    counts, bad, read = FilterCounts(), BadRecords(skip=skip_bad), list[Source]()
    sieve = _Sieve(plan, counts)
    with _new_folder(out) as folder:
        with closing(Parts(folder, part_bytes)) as parts:
            for number, file in enumerate(files):
                before = counts.read.documents
                for batch in _batches(_documents(file, field, bad)):
                    for each in sieve.kept(batch):
                        parts.write(each.record, each.where)
                    on_progress(_progress(number, files, counts))
                read.append(_source(file, counts.read.documents - before))
        if not counts.kept.documents:
            raise _nothing_left(sources, counts)
        counts.show_originals(_found_again(counts.originals, files, read, field, BadRecords(skip=skip_bad)))
        counts.left_out = Counter({"bad_records": bad.count, "files_of_unknown_kind": unknown})
        counts.first_bad = bad.first
        with store_errors(f"the report in {out}"):
            write_report(folder, {**plan.to_json(), "text_field": text_field}, read, parts.sources, counts)
    on_progress(_progress(len(files), files, counts))
    return counts


class _Sieve:
    """Decides on documents in their order."""

    def __init__(self, plan: FilterPlan, counts: FilterCounts) -> None:
        self._plan = plan
        self._counts = counts
        self._exact = ExactCopies()
        self._near = NearCopies()

    def kept(self, batch: list[_Read]) -> Iterator[_Read]:
        """Yield those that are kept, and count all."""
        passed: list[tuple[int, _Read, str, NDArray[np.uint64]]] = []
        before = self._counts.read.documents
        copied = self._exact.seen(
            [each.text for each in batch], np.arange(before, before + len(batch), dtype=np.uint32)
        )
        for number, (each, original) in enumerate(zip(batch, copied, strict=True), before):
            self._counts.read.add(each.text)
            if not each.text.strip():
                self._counts.drop(each.text, each.where, {"empty": None})
            elif original != NONE and self._plan.duplicates != "keep":
                self._counts.drop_copy(each.text, each.where, "exact_duplicate", original)
            elif (found := self._passes(each)) is not None:
                passed.append((number, each, *found))
        compared = [one for one in passed if len(one[-1])] if self._plan.duplicates == "near" else []
        numbers = np.array([number for number, *_ in compared], np.uint32)
        near = dict(zip(numbers.tolist(), self._near.seen([words for *_, words in compared], numbers), strict=True))
        for number, each, language, _ in passed:
            if (original := near.get(number, NONE)) != NONE:
                self._counts.drop_copy(each.text, each.where, "near_duplicate", original)
            else:
                self._counts.keep(each.text, language)
                yield each

    def _passes(self, each: _Read) -> tuple[str, NDArray[np.uint64]] | None:
        """Language and words of a document that languages and rules leave, else None."""
        language = language_of(each.text)
        reasons: dict[str, float | str | None] = {}
        if self._plan.languages is not None and language not in self._plan.languages:
            reasons["language"] = language
        words = normalised(each.text)
        hashes = word_hashes(words)
        lengths = np.fromiter(map(len, words.split()), np.int64)
        found = measures(each.text, hashes, lengths, stop_words(language), self._plan.bounds)
        reasons |= {name: value for name, value in found.items() if not self._plan.bounds[name].hold(value)}
        if reasons:
            self._counts.drop(each.text, each.where, reasons)
            return None
        return language, hashes


def _source(file: SourceFile, documents: int) -> Source:
    return Source(name=file.name, sha256=file_sha256(file.path), documents=documents)


def _documents(file: SourceFile, field: Field, bad: BadRecords) -> Iterator[_Read]:
    for document in documents(file, field, bad, vocab_size=0):
        assert isinstance(document, Text)
        pieces, size = [], 0
        for piece in document.pieces:
            size += len(piece)
            if size > MOST_CHARACTERS:
                raise LimitExceeded(
                    f"{document.where} has over {MOST_CHARACTERS >> 20} Mi characters, and each document is measured "
                    "as a whole; part it"
                )
            pieces.append(piece)
        text = "".join(pieces)
        record = {"source": file.name, field.name: text} if document.record is None else dict(document.record)
        # By the name that the report records, never by the path on this machine.
        yield _Read(file.name + document.where.removeprefix(str(file.path)), text, record)


def _found_again(
    numbers: set[int], files: Sequence[SourceFile], read: Sequence[Source], field: Field, bad: BadRecords
) -> dict[int, tuple[str, str]]:
    """Text and place of documents, of which files are read again up to the last of each."""
    found, first = dict[int, tuple[str, str]](), 0
    for file, source in zip(files, read, strict=True):
        mine = {number - first for number in numbers if 0 <= number - first < source.documents}
        for number, each in enumerate(islice(_documents(file, field, bad), max(mine, default=-1) + 1)):
            if number in mine:
                found[first + number] = each.text, each.where
        first += source.documents
    return found


def _batches(read: Iterator[_Read]) -> Iterator[list[_Read]]:
    batch: list[_Read] = []
    characters = 0
    for each in read:
        batch.append(each)
        characters += len(each.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _require_outside(out: Path, sources: Sequence[str | Path]) -> None:
    for source in map(Path, sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise InvalidInput(
                f"{str(out)!r} lies in the source {str(source)!r}, where the next reading would find it; name a folder "
                "outside of it"
            )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Make a folder that gets the name `out` at the end of the block, and is removed where that raises."""
    taken = AlreadyExists(f"{str(out)!r} is there already; name a new folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise taken
    with ExitStack() as stack, store_errors(f"the folder {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
        folder = Path(stack.enter_context(made)) / "kept"
        folder.mkdir()
        yield folder
        try:
            folder.rename(out)
        except OSError as error:
            if out.exists():  # since we looked
                raise taken from error
            raise


def _progress(done: int, files: list[SourceFile], counts: FilterCounts) -> FilterProgress:
    return FilterProgress(done, len(files), counts.read.documents, counts.kept.documents, counts.read.characters)


def _nothing_left(sources: Sequence[str | Path], counts: FilterCounts) -> InvalidInput:
    what = ", ".join(map(str, sources))
    if not counts.read.documents:
        return InvalidInput(f"there is no document in {what}")
    most = sorted(counts.dropped.items(), key=lambda item: -item[1].documents)[:3]
    by = ", ".join(f"{name} {found.documents:,}" for name, found in most)
    return InvalidInput(
        f"no document of {what} is kept: of {counted(counts.read.documents, 'document')} were dropped by {by}; "
        "loosen these with --rules FILE, --languages or --duplicates"
    )
