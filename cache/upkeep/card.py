"""A data card: what was recorded of a corpus, as a page of Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.corpus.sources.authorship import WRITTEN_BY, authors_of
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.cache.printable import printable
from potstill.cache.store.record import values_read
from potstill.cache.types import Fields
from potstill.cache.upkeep.inspection import against_text, inspect_cache

_LISTED = 100


def data_card(cache: Cache, name: str, filtered: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Write the card of a corpus.

    Args:
        cache: read only.
        name: the corpus's.
        filtered: reports of the filters whose files were ingested (`read_report`), by folder.

    Raises:
        UnknownCorpus: there is none of this name. InvalidInput: a report is of other files.
        FormatError: a report is damaged.
    """
    corpus = cache.corpus(name)
    found = inspect_cache(cache, name).to_json
    about = found["corpora"].get(name, {})
    lines = [f"# Corpus {_cell(name)}", ""]
    lines += [*_sizes(corpus, about), "", "## Sources", "", *_sources(corpus), "", "## Filter", ""]
    lines += [*_filter(corpus, filtered or {}), "", "## Benchmarks in it", ""]
    annotations = about.get("annotations", {})
    lines += [*_contamination(annotations), "", "## Written by models", "", *_authors(annotations), ""]
    lines += ["## Annotations", "", *_annotations(annotations), "", "## Teachers", ""]
    lines += _teachers({teacher: each[name] for teacher, each in found["targets"].items() if name in each})
    if found["unreadable"]:
        lines += ["", "## Not readable", "", *(f"- {printable(problem)}" for problem in found["unreadable"])]
    return "\n".join(lines) + "\n"


def _sizes(corpus: Corpus, about: Mapping[str, Any]) -> Iterator[str]:
    documents = corpus.spec.num_documents
    yield from _table(
        ["", ""],
        [
            ["rows", f"{len(corpus):,}, at most {corpus.spec.row_tokens:,} tokens"],
            ["positions", f"{corpus.num_positions:,}"],
            ["positions to be learnt", f"{about.get('taught_positions', corpus.num_positions):,}"],
            ["documents", "not recorded" if documents is None else f"{documents:,}"],
            ["rows equal to an earlier one", f"{corpus.spec.duplicate_rows:,}"],
            ["shards", f"{corpus.num_shards:,}"],
            ["stored", decimal(sum(item.size for item in corpus.spec.objects))],
            ["fingerprint", f"`{corpus.fingerprint}`"],
            ["tokenizer", f"`{corpus.tokenizer_sha256}`, {corpus.vocab_size:,} ids"],
        ],
    )


def _sources(corpus: Corpus) -> Iterator[str]:
    sources = corpus.spec.sources
    if not sources:
        yield "Not recorded."
        return
    yield from _files("file", [asdict(each) for each in sources])


def _files(heading: str, files: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """List the first of some files, each an object of a `Source`, and count the others."""
    rows = ([each["name"], f"{each['documents']:,}", f"`{each['sha256']}`"] for each in files[:_LISTED])
    yield from _table([heading, "documents", "sha256"], rows)
    if len(files) > _LISTED:
        yield ""
        yield f"And {counted(len(files) - _LISTED, 'file')} more."


def _filter(corpus: Corpus, reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if not reports:
        yield "Not recorded; `potstill card --filter FOLDER` takes what `potstill filter` wrote beside what it kept."
        return
    kept: set[str] = set()
    for folder, report in reports.items():
        with values_read(f"the report of the filter in {folder} is damaged"):
            mine = {output["sha256"] for output in report["outputs"]}
        if mine.isdisjoint(source.sha256 for source in corpus.spec.sources):
            raise InvalidInput(
                f"no source of corpus {corpus.name!r} is a file that the filter kept in {folder!r}; give "
                "folders that were ingested"
            )
        kept |= mine
    ours = sum(source.sha256 in kept for source in corpus.spec.sources)
    with values_read(f"the report of the filter in {', '.join(reports)} is damaged"):
        yield from _filtered(corpus, list(reports.values()), ours)


def _filtered(corpus: Corpus, reports: Sequence[Mapping[str, Any]], ours: int) -> Iterator[str]:
    of = "All sources are" if ours == len(corpus.spec.sources) else f"{ours:,} of {len(corpus.spec.sources):,} are"
    both = ("documents", "characters")
    amounts = _added(({key: report[key] for key in ("read", "kept")} for report in reports), both)
    read, left = amounts["read"], amounts["kept"]
    yield (
        f"{of} what a filter kept: {left['documents']:,} of {counted(read['documents'], 'document')}, "
        f"{left['characters']:,} of {read['characters']:,} characters."
    )
    yield ""
    yield from _files("filtered file", [source for report in reports for source in report["sources"]])
    yield ""
    dropped = _added((report["dropped"] for report in reports), ("documents", "alone", "characters"))
    yield from _table(["dropped by", "documents", "by it alone", "characters"], _amounts(dropped))
    yield ""
    languages = _added((report["languages"] for report in reports), both)
    yield from _table(["language of what is kept", *both], _amounts(languages))
    yield ""
    for settings in dict.fromkeys(json.dumps(report["settings"]) for report in reports):
        yield f"Settings: `{settings}`"


def _added(parts: Iterable[Mapping[str, Mapping[str, int]]], keys: Sequence[str]) -> dict[str, Counter[str]]:
    """Add up the named amounts of several reports; the one with most documents stands first."""
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for name, amount in part.items():
            total.setdefault(name, Counter()).update({key: amount[key] for key in keys})
    return dict(sorted(total.items(), key=lambda item: -item[1]["documents"]))


def _amounts(named: Mapping[str, Counter[str]]) -> Iterator[list[str]]:
    for name, amount in named.items():
        yield [name, *(f"{number:,}" for number in amount.values())]


def _contamination(annotations: Mapping[str, Any]) -> Iterator[str]:
    looked = {name: report for name, about in annotations.items() if (report := _report_of(about)) is not None}
    if not looked:
        yield "Not looked for; `potstill contamination` does."
    for name, report in looked.items():
        yield ""
        yield (
            f"Annotation `{name}`: {report['rows_with_items']:,} of {counted(report['rows'], 'row')} with items, by "
            f"runs of {report['ngram']} words."
        )
        yield ""
        keys = ("items", "not_looked_for", "found", "with_answer", "rows")
        columns = ["benchmark", *(key.replace("_", " ") for key in keys), "sha256"]
        rows = (
            [each["name"], *(f"{each[key]:,}" for key in keys), f"`{each['sha256']}`"] for each in report["benchmarks"]
        )
        yield from _table(columns, rows)


def _authors(annotations: Mapping[str, Any]) -> Iterator[str]:
    about = annotations.get(WRITTEN_BY)
    if about is None or "report" not in about["provenance"]:
        yield "Not recorded; `potstill ingest --completions` does."
        return
    with values_read(f"the record of annotation {WRITTEN_BY!r} is damaged"):
        authors = authors_of(about["provenance"]["report"])
    yield from _table(
        ["model", "documents", "rows", "written"],
        ([author.name, f"{author.documents:,}", f"{author.rows:,}", author.period] for author in authors),
    )


def _annotations(annotations: Mapping[str, Any]) -> Iterator[str]:
    if not annotations:
        yield "None."
        return
    rows = (
        [name, about["dtype"], about["provenance"].get("source") or about["provenance"].get("file") or "not recorded"]
        for name, about in annotations.items()
    )
    yield from _table(["name", "values", "source"], rows)


def _teachers(targets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if not targets:
        yield "None; `potstill prefill` keeps what they expect."
        return
    for teacher, each in targets.items():
        identity = each["identity"]
        sets = each["sets"]
        made = sorted(
            {f"{one['engine']} {one['engine_version']} on {one['device']}" for s in sets for one in s["provenance"]}
        )
        first, last = ([s[key] for s in sets if s[key]] for key in ("first_captured", "last_captured"))
        yield f"### {_cell(teacher)}"
        yield ""
        yield from _table(
            ["", ""],
            [
                ["model", f"{identity['model']}, revision {identity['revision'] or 'not recorded'}"],
                ["weights", f"`{identity['weights_sha256']}`"],
                [
                    "computed in",
                    f"{identity['dtype']}, head {identity['head_dtype']}, {identity['quantization']} quantization",
                ],
                ["adapters", ", ".join(identity["adapters"]) or "none"],
                ["prefix", str(identity["prefix_ids"])],
                ["kept", Fields.from_json(each["fields"]).text],
                ["encoding", f"{each['encoding']['name']}, measured against {against_text(each['measured_against'])}"],
                ["shards", f"{each['shards_committed']:,} of {each['shards']:,}"],
                ["stored", decimal(each["bytes"])],
                ["made by", "; ".join(made) or "not recorded"],
                ["captured", f"{min(first)} to {max(last)}" if first and last else "not recorded"],
            ],
        )
        yield ""


def _report_of(about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read what `potstill contamination` keeps with an annotation; None of another's."""
    try:
        report = json.loads(about["provenance"].get("report", ""))
    except (ValueError, TypeError):
        return None
    return report if isinstance(report, dict) and "benchmarks" in report else None


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(text: str) -> str:
    return " ".join(printable(text).replace("|", r"\|").split())
