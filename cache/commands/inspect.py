"""`potstill inspect`: what is in a cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from potstill.cache.commands.root_option import add_root_argument
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
    """Print it, records that cannot be read last on stderr; 1 when there are some."""
    from potstill.cache.cache import Cache
    from potstill.cache.upkeep.inspection import inspect_cache

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
    from rich.console import Console

    # A pipe has no width: nothing has to be squeezed into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(_corpora(found["corpora"]))
    console.print(_targets(found["targets"]))
    sets = [
        (teacher, corpus, each)
        for teacher, of in found["targets"].items()
        for corpus, about in of.items()
        for each in about["sets"]
    ]
    if sets:
        console.print(_sets(sets))
        console.print(_provenance(sets))
    if found["journals"]:
        console.print(_journals(found["journals"]))


def _corpora(corpora: dict[str, Any]) -> Any:
    table = _table(
        "corpora", "corpus", "rows", "positions", "shards", "duplicates", "bytes", "tokenizer", "annotations"
    )
    for name, about in corpora.items():
        numbers = (f"{about[key]:,}" for key in ("rows", "positions", "shards", "duplicate_rows", "bytes"))
        _add(table, name, *numbers, about["tokenizer_sha256"][:12], ", ".join(about["annotations"]) or "-")
    return table


def _targets(targets: dict[str, Any]) -> Any:
    table = _table("targets", "teacher", "corpus", "model", "k", "encoding", "shards", "bytes", "bytes/position")
    for teacher, of_corpus in targets.items():
        for corpus, about in of_corpus.items():
            _add(
                table,
                teacher,
                corpus,
                about["identity"]["model"],
                str(about["fields"]["k"]),
                about["encoding"]["name"],
                f"{about['shards_committed']:,}/{about['shards']:,}",
                f"{about['bytes']:,}",
                _number(about["bytes_per_position"], ".1f"),
            )
    return table


def _sets(sets: list[tuple[str, str, dict[str, Any]]]) -> Any:
    from potstill.cache.upkeep.inspection import against_text

    table = _table(
        "segment sets",
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
        "folded",
        "bytes/position",
    )
    for teacher, corpus, each in sets:
        error = each["measured_error"]
        _add(
            table,
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
            "yes" if each["folded"] else "no",
            _number(each["bytes_per_position"], ".1f"),
        )
    return table


def _provenance(sets: list[tuple[str, str, dict[str, Any]]]) -> Any:
    table = _table("captured by", "teacher", "corpus", "set", "engine", "device", "path", "shards", "first", "last")
    for teacher, corpus, each in sets:
        for made in each["provenance"]:
            _add(
                table,
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
    return table


def _journals(journals: dict[str, Any]) -> Any:
    table = _table("journals", "teacher", "segments", "rows", "positions", "bytes")
    for teacher, about in journals.items():
        _add(table, teacher, *(f"{about[key]:,}" for key in ("segments", "rows", "positions", "bytes")))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(title: str, *columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Any, *cells: str) -> None:
    """A row of plain text: a name out of a record is not rich's markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))
