"""`potstill inspect`: show what is in a cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.tables import print_table
from potstill.cache.errors import StoreError
from potstill.cache.logins import without_login
from potstill.cache.types import Fields

SUMMARY = "show the corpora and targets of a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write one page with charts to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the figures, then on stderr the records that cannot be read; exit status 1 when there are such."""
    from potstill.cache.cache import Cache
    from potstill.cache.upkeep import inspect_cache

    cache = Cache.open(args.cache)
    inspection = inspect_cache(cache)
    found = inspection.to_json
    if args.html is not None:
        from potstill.cache.upkeep.inspect_html import page

        _write(args.html, page(cache, inspection))
    if args.json:
        print(json.dumps(found, indent=1))
    elif not found["corpora"] and not found["unreadable"]:
        print(f"there is no corpus in {args.cache}; `potstill ingest` makes one")
    else:
        _print_tables(found)
    for line in found["unreadable"]:
        print(f"not counted above: {line}", file=sys.stderr)
    if found["unreadable"]:
        print(
            f"`potstill verify {without_login(args.cache)}` names all that is damaged and how to mend it",
            file=sys.stderr,
        )
    return int(bool(found["unreadable"]))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}; name another file after --html") from error


def _print_tables(found: dict[str, Any]) -> None:
    _print_corpora(found["corpora"])
    _print_targets(found["targets"])
    sets = [
        (teacher, corpus, each)
        for teacher, of in found["targets"].items()
        for corpus, about in of.items()
        for each in about["sets"]
    ]
    if sets:
        _print_sets(sets)
        _print_provenance(sets)
    if found["journals"]:
        _print_journals(found["journals"])


def _print_corpora(corpora: dict[str, Any]) -> None:
    columns = ("corpus", "rows", "positions", "shards", "duplicates", "bytes", "tokenizer", "annotations")
    rows = []
    for name, about in corpora.items():
        numbers = (f"{about[key]:,}" for key in ("rows", "positions", "shards", "duplicate_rows", "bytes"))
        rows.append((name, *numbers, about["tokenizer_sha256"][:12], ", ".join(about["annotations"]) or "-"))
    print_table(columns, rows, title="corpora")


def _print_targets(targets: dict[str, Any]) -> None:
    columns = ("teacher", "corpus", "model", "k", "encoding", "shards", "bytes", "bytes/position")
    rows = []
    for teacher, of_corpus in targets.items():
        for corpus, about in of_corpus.items():
            rows.append(
                (
                    teacher,
                    corpus,
                    about["identity"]["model"],
                    str(about["fields"]["k"]),
                    about["encoding"]["name"],
                    f"{about['shards_committed']:,}/{about['shards']:,}",
                    f"{about['bytes']:,}",
                    _number(about["bytes_per_position"], ".1f"),
                )
            )
    print_table(columns, rows, title="targets")


def _print_sets(sets: list[tuple[str, str, dict[str, Any]]]) -> None:
    from potstill.cache.upkeep.inspection import against_text

    columns = (
        "teacher",
        "corpus",
        "set",
        "fields",
        "encoding",
        "its bound",
        "max |Δlogprob|",
        "mean KL",
        "measured against",
        "shards",
        "manifest",
        "bytes/position",
    )
    rows = []
    for teacher, corpus, each in sets:
        error = each["measured_error"]
        rows.append(
            (
                teacher,
                corpus,
                each["name"],
                Fields.from_json(each["fields"]).text,
                each["encoding"]["name"],
                f"{each['encoding']['max_abs_error']:g}",
                _number(error.get("max_abs"), ".4f"),
                _number(error.get("mean_kl"), ".1e"),
                against_text(each["measured_against"]),
                f"{each['shards_committed']:,}/{each['shards']:,}",
                "written" if each["folded"] else "not yet",
                _number(each["bytes_per_position"], ".1f"),
            )
        )
    print_table(columns, rows, title="segment sets: fields that were scored together")


def _print_provenance(sets: list[tuple[str, str, dict[str, Any]]]) -> None:
    columns = ("teacher", "corpus", "set", "engine", "device", "path", "shards", "first", "last")
    rows = [
        (
            teacher,
            corpus,
            each["name"],
            f"{made['engine']} {made['engine_version']}",
            made["device"],
            made["capture_path"],
            f"{made['shards']:,}",
            each["first_captured"] or "-",
            each["last_captured"] or "-",
        )
        for teacher, corpus, each in sets
        for made in each["provenance"]
    ]
    print_table(columns, rows, title="captured by: what computed the targets, and when")


def _print_journals(journals: dict[str, Any]) -> None:
    columns = ("teacher", "segments", "rows", "positions", "bytes")
    rows = []
    for teacher, about in journals.items():
        rows.append((teacher, *(f"{about[key]:,}" for key in ("segments", "rows", "positions", "bytes"))))
    print_table(columns, rows, title="journals: rows that were asked for over HTTP and belong to no corpus")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
