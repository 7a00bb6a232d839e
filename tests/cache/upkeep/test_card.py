"""A data card of a corpus that was filtered, checked against benchmarks, and scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.cache.cache import Cache
from potstill.cache.commands.text import card as command, contamination, filter as filter_command
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.sources.files import FILTER_REPORT
from tests.support.command_line import refusal, run_command
from tests.support.corpora import byte_tokenizer, make_corpus, plan_targets, teacher_for, topics
from tests.support.filled_caches import commit


def table(card: str, section: str) -> dict[str, list[str]]:
    """Rows of a section's tables, by their first cell."""
    text = card.split(f"# {section}\n")[1].split("\n#", maxsplit=1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a cache; what was filtered for it lies in `kept`."""
    source = tmp_path / "a|b.jsonl"
    texts = [*topics(8, characters=2000), "short", topics(1, characters=2000)[0]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert run_command(filter_command, source, "--out", tmp_path / "kept") == 0
    cache = Cache.open(tmp_path / "cache", mode="r+")
    ingest(cache.root, "docs", [tmp_path / "kept"], byte_tokenizer(), IngestPlan(row_tokens=50))
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"question": topics(1)[0][100:300]}))
    arguments = ("--cache", tmp_path / "cache", "--corpus", "docs", "--against", bench)
    assert run_command(contamination, *arguments) == 0
    return tmp_path / "cache"


def test_a_card_has_what_was_recorded(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache.open(made, mode="r+")
    corpus = cache.corpus("docs")
    teacher = teacher_for(corpus)
    commit(plan_targets(cache, teacher), teacher, range(corpus.num_shards))
    arguments = ("--cache", made, "--corpus", "docs", "--filter", made.parent / "kept")
    assert run_command(command, *arguments, "--out", made.parent / "card.md") == 0
    card = (made.parent / "card.md").read_text()
    assert card.startswith("# Corpus docs\n")
    sizes = table(card, "Corpus docs")
    assert sizes["positions"] == [f"{corpus.num_positions:,}"]
    assert sizes["fingerprint"] == [f"`{corpus.fingerprint}`"]
    assert sizes["documents"] == ["8"]
    assert table(card, "Sources")["part-00000.jsonl"] == ["8", f"`{corpus.spec.sources[0].sha256}`"]
    filtered = table(card, "Filter")
    assert filtered["words"][0] == "1"
    assert filtered["en"][0] == "8"
    assert filtered[r"a\|b.jsonl"][0] == "10"
    assert "All sources are what a filter kept: 8 of 10 documents" in card
    found = table(card, "Benchmarks in it")["bench.jsonl"]
    assert found[:3] == ["1", "0", "1"]
    assert table(card, "Annotations")["contaminated"][0] == "bool"
    scored = table(card, "fake")
    assert scored["shards"] == [f"{corpus.num_shards} of {corpus.num_shards}"]
    assert scored["weights"] == [f"`{teacher.identity.weights_sha256}`"]
    capsys.readouterr()
    assert run_command(command, *arguments) == 0
    assert capsys.readouterr().out == card


def test_filters_of_parts_are_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [tmp_path / "kept" / name for name in "ab"]
    for folder, texts in zip(kept, (topics(2, characters=2000), [*topics(3, characters=900), "short"]), strict=True):
        source = tmp_path / f"{folder.name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert run_command(filter_command, source, "--out", folder, "--duplicates", "exact") == 0
    cache = Cache.open(tmp_path / "cache", mode="r+")
    ingest(cache.root, "docs", [tmp_path / "kept"], byte_tokenizer(), IngestPlan(row_tokens=50))
    arguments = ("--cache", tmp_path / "cache", "--corpus", "docs", "--filter")
    capsys.readouterr()
    assert run_command(command, *arguments, *kept) == 0
    card = capsys.readouterr().out
    assert "All sources are what a filter kept: 5 of 6 documents" in card
    filtered = table(card, "Filter")
    assert filtered["en"][0] == "5"
    assert filtered["words"][:2] == ["1", "1"]
    assert (filtered["a.jsonl"][0], filtered["b.jsonl"][0]) == ("2", "4")
    assert card.count("Settings: ") == 1
    assert run_command(command, *arguments, kept[0]) == 0
    assert "1 of 2 are what a filter kept: 2 of 2 documents" in capsys.readouterr().out


def test_what_was_not_recorded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "c")
    assert run_command(command, "--cache", tmp_path / "c", "--corpus", "docs") == 0
    card = capsys.readouterr().out
    assert "Not recorded; `potstill card --filter FOLDER`" in card
    assert "Not looked for; `potstill contamination` does." in card
    assert "## Annotations\n\nNone." in card
    assert "None; `potstill prefill` keeps" in card


def test_a_report_of_other_files_or_a_damaged_one_is_refused(made: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "c")
    kept = made.parent / "kept"
    arguments = ("--cache", tmp_path / "c", "--corpus", "docs", "--filter")
    assert "no source of corpus 'docs' is a file that the filter kept in" in refusal(command, *arguments, kept)
    assert f"holds no {FILTER_REPORT}" in refusal(command, *arguments, tmp_path)
    report = json.loads((kept / FILTER_REPORT).read_text())
    del report["read"]
    (kept / FILTER_REPORT).write_text(json.dumps(report))
    said = refusal(command, "--cache", made, "--corpus", "docs", "--filter", kept)
    assert said == f"the report of the filter in {kept} is damaged: KeyError('read')"
    assert "no corpus 'other'" in refusal(command, "--cache", made, "--corpus", "other")
    out = tmp_path / "no" / "card.md"
    assert f"there is no folder '{out.parent}'" in refusal(command, "--cache", made, "--corpus", "docs", "--out", out)
