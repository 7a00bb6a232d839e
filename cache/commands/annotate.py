"""`potstill annotate`: keep a value for each row of a sealed corpus, or list the annotations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from potstill.cache.cache import Cache
    from potstill.cache.corpus import Corpus

SUMMARY = "annotate the rows of a corpus, or list its annotations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--corpus", required=True, metavar="NAME", help="whose rows")
    parser.add_argument("--name", metavar="NAME", help="of the annotation, such as contaminated or held-out")
    parser.add_argument(
        "--values", metavar="FILE", help="a value of each row, in order: .npy, .txt (one a line) or .parquet"
    )
    parser.add_argument("--column", metavar="C", help="of a .parquet with several")
    parser.add_argument("--source", metavar="TEXT", help="where the values come from; kept beside them")


def run(args: argparse.Namespace) -> int:
    """Seal an annotation, or without --values list those that there are."""
    from potstill.cache.cache import Cache

    if args.values is None:
        unused = [f"--{name}" for name in ("column", "source") if getattr(args, name) is not None]
        if unused:
            raise InvalidInput(f"{' and '.join(unused)} without --values FILE; name the file, or leave it out to list")
        cache = Cache.open(args.cache)
        return _list(cache, cache.corpus(args.corpus), args.name)
    if args.name is None:
        raise InvalidInput("--values needs the annotation's name: --name NAME")
    return _annotate(Cache.open(args.cache, mode="r+"), args)


def _annotate(cache: Cache, args: argparse.Namespace) -> int:
    from pathlib import Path

    from potstill.cache.corpus import annotate
    from potstill.cache.corpus.row_values import read_row_values
    from potstill.cache.corpus.sources import file_sha256

    corpus = cache.corpus(args.corpus)
    file = Path(args.values)
    values = read_row_values(file, args.column)
    provenance = {"file": file.name, "file_sha256": file_sha256(file), "source": args.source or ""}
    annotate(cache.root, corpus.annotated, args.name, values, provenance)
    print(f"annotation {args.name} of corpus {corpus.name}: {_count(values)}")
    return 0


def _list(cache: Cache, corpus: Corpus, name: str | None) -> int:
    from potstill.cache.corpus.annotations import open_annotation

    names = corpus.annotations() if name is None else [name]
    if not names:
        print(f"corpus {corpus.name} has no annotation; --name and --values make one")
    for each in names:
        about = open_annotation(cache.root, corpus.annotated, each)
        source = about.provenance.get("source") or about.provenance.get("file") or "unknown source"
        print(f"{each}  {about.dtype}  {_count(corpus.annotation(each))}  ({source})")
    return 0


def _count(values: NDArray[Any]) -> str:
    import numpy as np

    rows = counted(len(values), "row")
    if values.dtype == bool:
        return f"{int(np.count_nonzero(values)):,} of {rows} true"
    return f"{int(np.count_nonzero(values)):,} of {rows} not 0, from {values.min().item()} to {values.max().item()}"
