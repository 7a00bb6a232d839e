"""The documents of a source file, by its kind."""

from __future__ import annotations

from collections.abc import Iterator

from potstill.cache.corpus.sources.documents import BadRecord, BadRecords, Document, Field, Text
from potstill.cache.corpus.sources.files import SourceFile
from potstill.cache.corpus.sources.tables import arrow_documents, parquet_documents
from potstill.cache.corpus.sources.token_files import token_documents
from potstill.cache.corpus.sources.written import TO_UTF8, json_lines, json_records, text_pieces

_RECORDS = {"lines": json_lines, "json": json_records, "parquet": parquet_documents, "arrow": arrow_documents}


def documents(
    file: SourceFile, field: Field, bad: BadRecords, *, vocab_size: int, eos: int | None = None
) -> Iterator[Document]:
    """Read the documents of one file, in order. A text file is one document.

    Args:
        file: one of `list_sources`.
        field: where the document is in records.
        bad: told of each record that holds none, and of a text file that is not UTF-8.
        vocab_size: one more than the tokenizer's largest id, by which raw files of token ids are read.
        eos: id at which their documents end.

    Raises:
        InvalidInput: the file is not of the kind that its name says, or has a bad record that is not to be left out.
        LimitExceeded: a record of JSON is too large.
    """
    if file.kind == "text":
        yield from _text(file, bad)
    elif file.kind == "tokens":
        yield from token_documents(file, vocab_size, eos)
    else:
        yield from _RECORDS[file.kind](file, field, bad)


def _text(file: SourceFile, bad: BadRecords) -> Iterator[Text]:
    if bad.skip:
        try:
            for _ in text_pieces(file):
                pass  # to its end first: what was read has become rows when a later piece is found bad
        except BadRecord as error:
            bad.add(str(error))
            return
    yield Text(str(file.path), _pieces(file, bad))


def _pieces(file: SourceFile, bad: BadRecords) -> Iterator[str]:
    try:
        yield from text_pieces(file)
    except BadRecord as error:
        raise bad.refusal(str(error), f"{TO_UTF8}, take the file out") from error
