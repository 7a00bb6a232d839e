"""`potstill ingest`: make a sealed corpus of text."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from potstill.cache.corpus import Corpus, IngestPlan
    from potstill.cache.corpus.plan import Found

SUMMARY = "make a sealed corpus of text, JSON, Parquet or token ids"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a file, or a folder of files")
    parser.add_argument("--cache", required=True, metavar="ROOT", help="folder or URL; a new folder is made")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="what to call the corpus")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH_OR_NAME",
        help="tokenizer.json, a folder with one, or a model's name on the Hugging Face hub",
    )
    parser.add_argument("--row-tokens", type=int, default=512, help="longest row, in tokens (default %(default)s)")
    parser.add_argument(
        "--shard-positions",
        type=int,
        metavar="N",
        help="positions a shard, the unit that a fill keeps (default: a 64th of the corpus, 4,096 to 1,048,576)",
    )
    _add_documents(parser)


def _add_documents(parser: argparse.ArgumentParser) -> None:
    fields = parser.add_mutually_exclusive_group()
    fields.add_argument(
        "--text-field", default="text", metavar="F", help="key or column of records with text (default %(default)s)"
    )
    fields.add_argument("--ids-field", metavar="F", help="key or column of records with lists of token ids")
    fields.add_argument(
        "--messages-field",
        metavar="F",
        help="key or column of records with messages, for the chat template",
    )
    fields.add_argument(
        "--completions",
        choices=["context", "learn", "alone", "chat"],
        help="records are what models wrote: take the prompt as context, learn it too, take the completion alone, or "
        "write both by the chat template",
    )
    parser.add_argument("--written-by", metavar="NAME", help="model of completions whose record names none")
    parser.add_argument("--written-at", metavar="TIME", help="time of completions whose record has none, as 2024-05-31")
    parser.add_argument("--append-eos", action="store_true", help="put the tokenizer's EOS behind each document")
    parser.add_argument("--prepend-bos", action="store_true", help="put the tokenizer's BOS before each document")
    parser.add_argument(
        "--special-tokens",
        choices=["split", "keep", "refuse"],
        default="split",
        help="control tokens that stand in text: take them as text, keep them as control tokens, or refuse them "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records that hold no document, and text files that are not UTF-8, and count them",
    )
    parser.add_argument("--skip-unknown", action="store_true", help="leave out files of unknown kinds in folders")


def run(args: argparse.Namespace) -> int:
    """Ingest, and print a summary."""
    from dataclasses import fields

    from potstill.cache.corpus import IngestPlan
    from potstill.cache.corpus.document_tokens import DocumentTokens
    from potstill.cache.corpus.plan import Found
    from potstill.cache.corpus.sources import list_sources
    from potstill.cache.corpus.tokenizer import load_tokenizer
    from potstill.cache.corpus.tokenizer_files import declared_bos, load_tokenizer_files
    from potstill.cache.store.root import check_name

    plan = IngestPlan(**{each.name: getattr(args, each.name) for each in fields(IngestPlan)})
    # All arguments are checked before a cache folder is made.
    check_name("corpus", args.corpus)
    list_sources(args.sources, plan.field, skip_unknown=plan.skip_unknown)
    tokenizer, files, found = load_tokenizer(args.tokenizer), load_tokenizer_files(args.tokenizer), Found()
    DocumentTokens(tokenizer, files, plan, found)
    bos = None if plan.prepend_bos else declared_bos(tokenizer, files)
    # A text has none for sure, and its ingest may take hours.
    if bos is not None and plan.field.kind == "text":
        _warn_of_bos(tokenizer, bos)
    corpus = _ingested(args, tokenizer, files, plan, found)
    if bos is not None and plan.field.kind != "text" and not found.began_with_bos:
        _warn_of_bos(tokenizer, bos)
    print(_summary(corpus, plan, found))
    return 0


def _ingested(
    args: argparse.Namespace, tokenizer: Tokenizer, files: dict[str, str], plan: IngestPlan, found: Found
) -> Corpus:
    from potstill.cache.cache import Cache
    from potstill.cache.corpus.ingest import IngestProgress, ingest

    with ExitStack() as stack:
        cache = Cache.open(args.cache, mode="r+")
        stack.callback(cache.root.remove_if_unused)
        show = stack.enter_context(progress("ingest", "tokens"))

        def on_progress(at: IngestProgress) -> None:
            show(at.tokens, None, f"{at.files_done}/{counted(at.files, 'file')}")

        return ingest(
            cache.root,
            args.corpus,
            args.sources,
            tokenizer,
            plan,
            tokenizer_files=files,
            found=found,
            on_progress=on_progress,
        )


def _warn_of_bos(tokenizer: Tokenizer, bos: int) -> None:
    sys.stderr.write(
        f"warning: this tokenizer begins every text with {tokenizer.id_to_token(bos)!r}, and these rows do not begin "
        f"with it; say --prepend-bos, or give it to the teachers: prefill --option prefix_ids=[{bos}]\n"
    )


def _summary(corpus: Corpus, plan: IngestPlan, found: Found) -> str:
    from potstill.cache.corpus.control_tokens import in_words

    spec = corpus.spec
    size = (
        f"corpus {corpus.name}: {counted(spec.num_positions, 'position')} in {counted(spec.num_rows, 'row')} and "
        f"{counted(spec.num_shards, 'shard')} from {counted(sum(s.documents for s in spec.sources), 'document')} "
        f"of {counted(len(spec.sources), 'file')}"
    )
    parts = [size, counted(spec.duplicate_rows, "duplicate row")]
    if found.unknown_files:
        parts.append(f"{counted(found.unknown_files, 'file')} of unknown kinds left out")
    if found.bad_records:
        parts.append(f"{counted(found.bad_records, 'bad record')} left out (first: {found.first_bad})")
    if found.empty.count:
        parts.append(f"{counted(found.empty.count, 'empty document')} left out (first: {found.empty.first})")
    if found.untaught.count:
        what = "completion" if plan.completions else "conversation"
        have = "has" if found.untaught.count == 1 else "have"
        parts.append(f"{counted(found.untaught.count, what)} {have} nothing to learn (first: {found.untaught.first})")
    if found.authorship.authors:
        parts.append(f"written by {found.authorship.in_words()}")
    if found.control_tokens:
        done = "kept" if plan.special_tokens == "keep" else "taken as text"
        parts.append(f"control tokens in text {done}: {in_words(found.control_tokens)}")
    if plan.prepend_bos and found.began_with_bos:
        parts.append(f"{counted(found.began_with_bos, 'document')} began with BOS already")
    if found.ended_with_eos:
        parts.append(f"{counted(found.ended_with_eos, 'document')} ended with EOS already")
    return "; ".join(parts)
