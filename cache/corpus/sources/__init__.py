"""Sources of an ingest: the files of folders, and their documents as text, token ids, messages or completions.

`files` lists, `reading` reads a file's documents by its kind, `documents` has what a document may be, `authorship` who
wrote it where a model did.
"""

from __future__ import annotations

from potstill.cache.corpus.sources.documents import (
    BadRecords,
    Completion,
    Conversation,
    Document,
    Field,
    Ids,
    Text,
)
from potstill.cache.corpus.sources.files import SourceFile, file_sha256, list_sources
from potstill.cache.corpus.sources.reading import documents

__all__ = [
    "BadRecords",
    "Completion",
    "Conversation",
    "Document",
    "Field",
    "Ids",
    "SourceFile",
    "Text",
    "documents",
    "file_sha256",
    "list_sources",
]
