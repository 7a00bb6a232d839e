"""`potstill ingest`: make a sealed corpus of text."""

from __future__ import annotations

import argparse

from potstill.cache.commands.progress import progress
from potstill.cache.plurals import counted

SUMMARY = "make a sealed corpus of text, JSONL or Parquet"


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
    parser.add_argument("--text-field", default="text", help="key or column of JSONL and Parquet (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Ingest, and print a summary."""
    from potstill.cache.cache import Cache
    from potstill.cache.corpus import IngestPlan
    from potstill.cache.corpus.documents import source_files
    from potstill.cache.corpus.ingest import IngestProgress, ingest
    from potstill.cache.corpus.tokenizer import load_tokenizer
    from potstill.cache.store.root import check_name

    plan = IngestPlan(row_tokens=args.row_tokens, shard_positions=args.shard_positions, text_field=args.text_field)
    # All arguments are checked before a cache folder is made.
    check_name("corpus", args.corpus)
    source_files(args.sources)
    tokenizer = load_tokenizer(args.tokenizer)
    cache = Cache.open(args.cache, mode="r+")
    with progress("ingest", "tokens") as show:

        def on_progress(at: IngestProgress) -> None:
            show(at.tokens, None, f"{at.files_done}/{counted(at.files, 'file')}")

        corpus = ingest(cache.root, args.corpus, args.sources, tokenizer, plan, on_progress=on_progress)
    spec = corpus.spec
    print(
        f"corpus {corpus.name}: {counted(spec.num_positions, 'position')} in {counted(spec.num_rows, 'row')} and "
        f"{counted(spec.num_shards, 'shard')} from {counted(sum(s.documents for s in spec.sources), 'document')} "
        f"of {counted(len(spec.sources), 'file')}; {counted(spec.duplicate_rows, 'duplicate row')}"
    )
    return 0
