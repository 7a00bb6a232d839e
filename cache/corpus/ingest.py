"""Ingest: from text, or rows of token ids, to a sealed corpus.

Documents are tokenized in batches and cut into rows that never cross a document; rows that are token ids already
stay as they are. Rows are spooled to temporary files, so that memory stays flat, then written to a new Zarr group,
which the seal makes a corpus. When it fails or is stopped, nothing is sealed and what was written is removed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from potstill.cache.corpus.annotations import annotate
from potstill.cache.corpus.chat_template import ASSISTANT
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.document_tokens import DocumentTokens
from potstill.cache.corpus.plan import (
    Found,
    IngestPlan as IngestPlan,  # noqa: PLC0414 -- handed on to those who ingest
)
from potstill.cache.corpus.seal import Source, corpus_path, read_seal, seal_corpus
from potstill.cache.corpus.sources import SourceFile, file_sha256, list_sources
from potstill.cache.corpus.sources.authorship import ANNOTATIONS
from potstill.cache.corpus.spool import RowSpool, SourceRow
from potstill.cache.corpus.tokenizer import MAX_TOKENIZER_BYTES, fingerprint, num_ids
from potstill.cache.corpus.tokenizer_files import SpecialTokens
from potstill.cache.corpus.writing import write_corpus
from potstill.cache.errors import AlreadyExists, InvalidInput
from potstill.cache.store import GroupWriter, Root
from potstill.cache.store.groups import attempt_name, removed_on_failure
from potstill.cache.types import Tokens

_PROGRESS_ROWS = 1024
_NAMED = 8


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """Progress of an ingest: files read, of how many, and tokens so far."""

    files_done: int
    files: int
    tokens: int


def ingest(
    root: Root,
    name: str,
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    plan: IngestPlan,
    *,
    tokenizer_files: Mapping[str, str] | None = None,
    found: Found | None = None,
    on_progress: Callable[[IngestProgress], None] = lambda _: None,
) -> Corpus:
    """Make the corpus `name` from files and folders, and return it; `found` counts what it comes across.

    `tokenizer_files` (`load_tokenizer_files`) are kept with the tokenizer.

    Raises:
        AlreadyExists: the name is taken. InvalidInput: a source is bad, there is no token in all of them, or the
            tokenizer's files are of another one.
        StoreError: the store is full or cannot be written; nothing is left behind.
    """
    found = found or Found()
    files, found.unknown_files = list_sources(sources, plan.field, skip_unknown=plan.skip_unknown)
    # Asked first to save hours of work; creating the seal is what decides.
    if not _was_stopped_at_its_end(root, name, files, plan):
        _require_free(root, name)
    tokenizer = _plain_tokenizer(tokenizer)
    tokens = DocumentTokens(tokenizer, tokenizer_files or {}, plan, found)

    def fill(spool: RowSpool) -> tuple[Source, ...]:
        return tuple(_ingest_files(files, tokens, plan, spool, found, on_progress))

    what = ", ".join(map(str, sources))
    corpus = _make_corpus(root, name, tokenizer, plan, fill, tokenizer_files or {}, found, what=what)
    there = corpus.annotations()
    for annotation, values, provenance in found.authorship.annotations():
        if annotation not in there:
            annotate(root, corpus.annotated, annotation, values, provenance)
    return corpus


def ingest_rows(
    root: Root,
    name: str,
    rows: Iterable[Tokens | SourceRow],
    tokenizer: Tokenizer,
    plan: IngestPlan,
    *,
    sources: tuple[Source, ...] = (),
    tokenizer_files: Mapping[str, str] | None = None,
    on_progress: Callable[[IngestProgress], None] = lambda _: None,
) -> Corpus:
    """Make the corpus `name` from rows of token ids, which are kept whole, and return it.

    The arrays must not be changed after they were yielded. `sources` says where they come from. The corpus knows which
    row is of which document where some `SourceRow` ends one. `tokenizer_files` are as in `ingest`.

    Raises:
        AlreadyExists: the name is taken. InvalidInput: there is no row; a row is empty or longer than
            `plan.row_tokens`, or has an id that the tokenizer does not have.
        StoreError: the store is full or cannot be written; nothing is left behind.
    """
    _require_free(root, name)

    def fill(spool: RowSpool) -> tuple[Source, ...]:
        tokens = 0
        for count, each in enumerate(rows, start=1):
            row = each if isinstance(each, SourceRow) else SourceRow(each)
            spool.add(row.tokens, row.taught)
            if row.ends_document:
                spool.end_document()
            tokens += len(row.tokens)
            if count % _PROGRESS_ROWS == 0:
                on_progress(IngestProgress(0, len(sources), tokens))
        return sources

    plain = _plain_tokenizer(tokenizer)
    return _make_corpus(root, name, plain, plan, fill, tokenizer_files or {}, Found(), what="the rows")


def cut(blocks: Iterable[Tokens], row_tokens: int) -> Iterator[Tokens]:
    """Cut a document, given as blocks of token ids, into rows of `row_tokens` tokens; only the last may be shorter."""
    rest = np.empty(0, dtype=np.uint32)
    for block in blocks:
        tokens = np.concatenate([rest, block])
        whole = len(tokens) - len(tokens) % row_tokens
        for start in range(0, whole, row_tokens):
            yield tokens[start : start + row_tokens]
        rest = tokens[whole:]
    if len(rest):
        yield rest


def _require_free(root: Root, name: str) -> None:
    if root.get(f"{corpus_path(name)}/zarr.json") is not None:
        raise _taken(root, name)


def _was_stopped_at_its_end(root: Root, name: str, files: Sequence[SourceFile], plan: IngestPlan) -> bool:
    """Tell whether a corpus of these completions was sealed by an ingest that then could not say who wrote its rows."""
    if plan.completions is None or root.get(f"{corpus_path(name)}/zarr.json") is None:
        return False
    corpus = Corpus.open(root, name)
    if set(ANNOTATIONS) <= set(corpus.annotations()):
        return False
    there = [(source.name, source.sha256) for source in corpus.spec.sources]
    return there == [(file.name, file_sha256(file.path)) for file in files]


def _taken(root: Root, name: str) -> AlreadyExists:
    return AlreadyExists(
        f"corpus {name!r} is sealed in {root.url}; use it if it is of the same text, else take another name"
    )


def _make_corpus(
    root: Root,
    name: str,
    tokenizer: Tokenizer,
    plan: IngestPlan,
    fill: Callable[[RowSpool], tuple[Source, ...]],
    tokenizer_files: Mapping[str, str],
    found: Found,
    *,
    what: str,
) -> Corpus:
    """Write the rows that `fill` spools to a new group, and seal it; `what` names their source in errors."""
    vocab_size = num_ids(tokenizer)
    SpecialTokens.of(tokenizer_files, tokenizer)  # hours of work end in a corpus that says them, or do not begin
    with tempfile.TemporaryDirectory(prefix="potstill-ingest-") as folder:
        spool = RowSpool(Path(folder), fingerprint(tokenizer), vocab_size, plan.row_tokens)
        with spool:
            sources = fill(spool)
        if not spool.num_rows:
            raise InvalidInput(f"there is no token in {what}; a corpus cannot be empty")
        if spool.num_untaught == spool.num_positions:
            raise _nothing_to_learn(what, found)
        group = f"{corpus_path(name)}/{attempt_name('data')}"
        with removed_on_failure(root, group):
            writer = GroupWriter(root, group)
            spec = write_corpus(
                writer, spool, tokenizer, sources, tokenizer_files=tokenizer_files, shard_positions=plan.shard_positions
            )
        # From here on the seal may name the group, also when sealing raises: it is not ours to delete.
        if not seal_corpus(root, name, spec):
            root.delete(group)
            if read_seal(root, name).fingerprint != spec.fingerprint or not found.authorship.authors:
                raise _taken(root, name)
    return Corpus.open(root, name)


def _ingest_files(
    files: list[SourceFile],
    document_tokens: DocumentTokens,
    plan: IngestPlan,
    spool: RowSpool,
    found: Found,
    on_progress: Callable[[IngestProgress], None],
) -> Iterator[Source]:
    rows = tokens = 0
    for number, file in enumerate(files):
        count = 0
        for document in document_tokens.of_file(file):
            at, before = 0, rows
            for row in cut(document.blocks, plan.row_tokens):
                spool.add(row, None if document.taught is None else document.taught[at : at + len(row)])
                at += len(row)
                rows, tokens = rows + 1, tokens + len(row)
                if rows % _PROGRESS_ROWS == 0:
                    on_progress(IngestProgress(number, len(files), tokens))
            spool.end_document()
            if not at:
                found.empty.add(document.where)
                continue
            count += 1
            if document.written is not None:
                found.authorship.add(document.written, rows - before)
            if document.taught is not None and not document.taught.any():
                found.untaught.add(document.where)
        yield Source(name=file.name, sha256=file_sha256(file.path), documents=count)
        on_progress(IngestProgress(number + 1, len(files), tokens))


def _nothing_to_learn(what: str, found: Found) -> InvalidInput:
    if not found.roles or ASSISTANT in found.roles:
        return InvalidInput(f"no token of {what} is to be learnt; a corpus needs one that its loss mask leaves")
    roles = ", ".join(repr(role) for role, _ in found.roles.most_common(_NAMED))
    return InvalidInput(
        f"no message of {what} has the role {ASSISTANT!r}, so nothing is to be learnt; the roles are {roles}: rename "
        f"that of the messages to learn to {ASSISTANT!r}"
    )


def _plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer, without the truncation and padding that its file may ask for.

    Raises:
        InvalidInput: it is larger than what a corpus keeps.
    """
    text = tokenizer.to_str()
    size = len(text.encode())
    if size > MAX_TOKENIZER_BYTES:
        raise InvalidInput(
            f"the tokenizer has {size} bytes as JSON, and a corpus keeps at most {MAX_TOKENIZER_BYTES}; "
            "take out what is no part of its vocabulary"
        )
    plain = Tokenizer.from_str(text)
    plain.no_truncation()
    plain.no_padding()
    return plain
