"""`potstill inspect`: show what is in a cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.tables import print_table
from potstill.cache.errors import StoreError
from potstill.cache.logins import without_login
from potstill.cache.types import Fields

SUMMARY = "show the corpora and targets of a cache"

_Columns: TypeAlias = Mapping[str, Callable[[dict[str, Any]], object]]


def _count(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda about: f"{about[key]:,}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _documents(about: dict[str, Any]) -> str:
    return "-" if about["documents"] is None else f"{about['documents']:,}"


def _taught(about: dict[str, Any]) -> str:
    """Share of the targets that are to be learnt; a dash where there is no loss mask."""
    taught, positions = about["taught_positions"], about["positions"]
    return "-" if taught == positions else f"{taught / positions:.1%}"


_CORPORA: _Columns = {
    "corpus": itemgetter("corpus"),
    "documents": _documents,
    "rows": _count("rows"),
    "positions": _count("positions"),
    "shards": _count("shards"),
    "taught": _taught,
    "duplicates": _count("duplicate_rows"),
    "bytes": _count("bytes"),
    "tokenizer": lambda about: about["tokenizer_sha256"][:12],
    "annotations": lambda about: ", ".join(about["annotations"]) or "-",
}
_TARGETS: _Columns = {
    "teacher": itemgetter("teacher"),
    "corpus": itemgetter("corpus"),
    "model": lambda about: about["identity"]["model"],
    "k": lambda about: about["fields"]["k"],
    "encoding": lambda about: about["encoding"]["name"],
    "shards": lambda about: f"{about['shards_committed']:,}/{about['shards']:,}",
    "bytes": _count("bytes"),
    "bytes/position": lambda about: _number(about["bytes_per_position"], ".1f"),
}
_SETS: _Columns = {
    "teacher": itemgetter("teacher"),
    "corpus": itemgetter("corpus"),
    "set": itemgetter("name"),
    "fields": lambda about: Fields.from_json(about["fields"]).text,
    "encoding": _TARGETS["encoding"],
    "its bound": lambda about: f"{about['encoding']['max_abs_error']:g}",
    "max |Δlogprob|": lambda about: _number(about["measured_error"].get("max_abs"), ".4f"),
    "mean KL": lambda about: _number(about["measured_error"].get("mean_kl"), ".1e"),
    "measured against": itemgetter("against"),
    "shards": _TARGETS["shards"],
    "manifest": lambda about: "written" if about["folded"] else "not yet",
    "bytes/position": _TARGETS["bytes/position"],
}
_PROVENANCE: _Columns = {
    "teacher": itemgetter("teacher"),
    "corpus": itemgetter("corpus"),
    "set": itemgetter("name"),
    "engine": lambda about: f"{about['engine']} {about['engine_version']}",
    "device": itemgetter("device"),
    "path": itemgetter("capture_path"),
    "shards": _count("shards"),
    "first": lambda about: about["first_captured"] or "-",
    "last": lambda about: about["last_captured"] or "-",
}
_JOURNALS: _Columns = {
    "teacher": itemgetter("teacher"),
    **{name: _count(name) for name in ("segments", "rows", "positions", "bytes")},
}


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
    from potstill.cache.upkeep.inspection import against_text

    targets = [
        {"teacher": teacher, "corpus": corpus, **about}
        for teacher, of in found["targets"].items()
        for corpus, about in of.items()
    ]
    sets = [
        {"teacher": of["teacher"], "corpus": of["corpus"], **each, "against": against_text(each["measured_against"])}
        for of in targets
        for each in of["sets"]
    ]
    made = [{**each, **provenance} for each in sets for provenance in each["provenance"]]
    journals = [{"teacher": teacher, **about} for teacher, about in found["journals"].items()]
    print_table(_CORPORA, [{"corpus": name, **about} for name, about in found["corpora"].items()], title="corpora")
    print_table(_TARGETS, targets, title="targets")
    _print_unshared(targets)
    if sets:
        print_table(_SETS, sets, title="segment sets: fields that were scored together")
        print_table(_PROVENANCE, made, title="captured by: what computed the targets, and when")
    if journals:
        about = "journals: rows that were asked for over HTTP and belong to no corpus"
        print_table(_JOURNALS, journals, title=about)


def _print_unshared(targets: list[dict[str, Any]]) -> None:
    from potstill.cache.targets.unshared_ids import UnsharedIds

    lines = [
        f"{of['teacher']} on {of['corpus']}: the tokenizer differs in {unshared.text} that no row uses"
        for of in targets
        if (unshared := UnsharedIds.from_json(of["unshared_ids"]))
    ]
    if lines:
        print("\n".join(lines) + "\n")
