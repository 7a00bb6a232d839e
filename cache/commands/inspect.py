"""`potstill inspect`: what is in a cache."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.cache import Cache
    from cache.targets import TargetSet

SUMMARY = "show the corpora and targets of a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("root", metavar="ROOT")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from cache.cache import Cache

    found = describe(Cache.open(args.root))
    if args.json:
        print(json.dumps(found, indent=1))
    elif not found["corpora"]:
        print(f"there is no corpus in {args.root}; `potstill ingest` makes one")
    else:
        _print_tables(found)
    return 0


def describe(cache: Cache) -> dict[str, Any]:
    """Every corpus and every target set, as `--json` prints it."""
    corpora: dict[str, Any] = {}
    targets: dict[str, dict[str, Any]] = {}
    for name in cache.corpora():
        corpus = cache.corpus(name)
        corpora[name] = {
            "rows": len(corpus),
            "positions": corpus.num_positions,
            "shards": corpus.num_shards,
            "tokenizer_sha256": corpus.tokenizer_sha256,
            "duplicate_rows": corpus.spec.duplicate_rows,
            "sources": [source.to_json() for source in corpus.spec.sources],
        }
        for teacher in cache.teachers(name):
            targets.setdefault(teacher, {})[name] = _describe_targets(cache.targets(teacher, name))
    return {"corpora": corpora, "targets": targets}


def _describe_targets(targets: TargetSet) -> dict[str, Any]:
    commits = targets.commits()
    lengths = targets.corpus.shard_starts[1:] - targets.corpus.shard_starts[:-1]
    positions = int(sum(lengths[commit.shard] for commit in commits))
    stored = sum(commit.num_bytes for commit in commits)
    return {
        "identity": targets.identity.to_json(),
        "fields": targets.fields.to_json(),
        "encoding": targets.encoding.to_json(),
        "shards_committed": len(commits),
        "shards": targets.corpus.num_shards,
        "bytes": stored,
        "bytes_per_position": stored / positions if positions else None,
        "measured_error": _worst_error(targets),
    }


def _worst_error(targets: TargetSet) -> dict[str, float]:
    """The largest of each error figure over the commits."""
    errors = [commit.error for commit in targets.commits()]
    return {name: max(error[name] for error in errors) for name in (errors[0] if errors else ())}


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    corpora = Table("corpus", "rows", "positions", "shards", "duplicates", "tokenizer", title="corpora")
    for name, about in found["corpora"].items():
        numbers = (f"{about[key]:,}" for key in ("rows", "positions", "shards", "duplicate_rows"))
        corpora.add_row(name, *numbers, about["tokenizer_sha256"][:12])
    sets = Table("teacher", "corpus", "model", "k", "encoding", "shards", "bytes", "bytes/position", title="targets")
    for teacher, of_corpus in found["targets"].items():
        for corpus, about in of_corpus.items():
            per_position = about["bytes_per_position"]
            sets.add_row(
                teacher,
                corpus,
                about["identity"]["model"],
                str(about["fields"]["k"]),
                about["encoding"]["name"],
                f"{about['shards_committed']:,}/{about['shards']:,}",
                f"{about['bytes']:,}",
                "-" if per_position is None else f"{per_position:.1f}",
            )
    console = Console()
    console.print(corpora)
    console.print(sets)
