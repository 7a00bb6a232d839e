"""Filtering of files, through the command and below it."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.cache.cache import Cache
from potstill.cache.commands.text import filter as command
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.sources import file_sha256
from potstill.cache.corpus.sources.files import FILTER_REPORT
from potstill.cache.errors import AlreadyExists, InvalidInput, LimitExceeded
from potstill.cache.text import filtering
from potstill.cache.text.filter_report import SAMPLES, read_report
from potstill.cache.text.filtering import FilterProgress, filter_files
from potstill.cache.text.rules import FilterPlan
from tests.support.command_line import refusal, run_command
from tests.support.corpora import byte_tokenizer, topics

GERMAN = (
    "Das Gefäß wird für jeden Brand neu gefüllt, und was zuerst kommt, wird getrennt aufbewahrt. Danach beginnt der "
    "mittlere Lauf, der in Fässern reift, bis er nach einigen Jahren in Flaschen gefüllt wird."
)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(folder.glob("*.jsonl")) for line in part.read_text().splitlines()]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good texts with an exact copy, a near copy, a German text, junk of two kinds and an empty one."""
    good = topics(6, characters=3000)
    texts = [*good, good[0], good[1] + " More.", GERMAN, "buy now " * 200, "short", " "]
    return write_lines(tmp_path / "mixed.jsonl", [{"text": text, "id": n} for n, text in enumerate(texts)])


def test_what_is_kept_and_what_is_told(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, mixed, "--out", tmp_path / "out") == 0
    assert [record["id"] for record in kept(tmp_path / "out")] == [0, 1, 2, 3, 4, 5, 8]
    report = read_report(tmp_path / "out")
    assert report["read"]["documents"] == 12
    assert report["kept"]["documents"] == 7
    counts = {name: found["documents"] for name, found in report["dropped"].items()}
    for name in ("exact_duplicate", "near_duplicate", "words", "empty", "top_2_gram"):
        assert counts[name] == 1, name
    assert report["dropped"]["words"]["alone"] == 1
    (sample,) = report["dropped"]["exact_duplicate"]["samples"]
    assert sample["where"] == "mixed.jsonl:7"
    assert topics(1)[0].strip()[:100] == sample["text"][:100]
    assert sample["copy_of"]["where"] == "mixed.jsonl:1"
    (near,) = report["dropped"]["near_duplicate"]["samples"]
    assert near["copy_of"] == {"where": "mixed.jsonl:2", "text": near["text"]}
    assert {name: amount["documents"] for name, amount in report["languages"].items()} == {"en": 6, "de": 1}
    (output,) = report["outputs"]
    assert output == {
        "name": "part-00000.jsonl",
        "sha256": file_sha256(tmp_path / "out" / "part-00000.jsonl"),
        "documents": 7,
    }
    assert report["sources"] == [{"name": "mixed.jsonl", "sha256": file_sha256(mixed), "documents": 12}]
    said = capsys.readouterr().out
    assert "kept 7 of 12 documents" in said
    assert "near_duplicate: mixed.jsonl:8, like mixed.jsonl:2: " in said


def test_what_is_kept_is_ingested_as_it_is(mixed: Path, tmp_path: Path) -> None:
    filter_files([mixed], tmp_path / "out", FilterPlan.read("default"))
    cache = Cache.open(tmp_path / "cache", mode="r+")
    corpus = ingest(cache.root, "docs", [tmp_path / "out"], byte_tokenizer(), IngestPlan(row_tokens=64))
    assert [(source.name, source.documents) for source in corpus.spec.sources] == [("part-00000.jsonl", 7)]


def test_options_and_rules(mixed: Path, tmp_path: Path) -> None:
    assert run_command(command, mixed, "--out", tmp_path / "german", "--languages", "de") == 0
    assert [record["id"] for record in kept(tmp_path / "german")] == [8]
    assert read_report(tmp_path / "german")["dropped"]["language"]["documents"] == 9
    assert run_command(command, mixed, "--out", tmp_path / "exact", "--duplicates", "exact") == 0
    assert 7 in [record["id"] for record in kept(tmp_path / "exact")]
    assert 6 not in [record["id"] for record in kept(tmp_path / "exact")]
    (tmp_path / "all.toml").write_text('duplicates = "keep"\n[rules]\nwords = {}\ntop_2_gram = {}\n')
    assert run_command(command, mixed, "--out", tmp_path / "all", "--rules", tmp_path / "all.toml") == 0
    assert [record["id"] for record in kept(tmp_path / "all")] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_all_kinds_of_files_and_the_fields_of_their_records(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = topics(8, characters=1500)
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": texts[0], "meta": {"url": "é", "tags": [1, None]}}) + "\n")
    (folder / "b.json").write_text(json.dumps([{"body": texts[1], "n": 1}]))
    day = dt.date(2026, 5, 4)
    pq.write_table(pa.table({"n": [7, 8], "body": texts[2:4], "day": [day, None]}), folder / "c.parquet")
    (folder / "d.txt").write_text(texts[4])
    assert run_command(command, folder, "--out", tmp_path / "deep" / "out", "--text-field", "body") == 0
    assert kept(tmp_path / "deep" / "out") == [
        {"body": texts[0], "meta": {"url": "é", "tags": [1, None]}},
        {"body": texts[1], "n": 1},
        {"n": 7, "body": texts[2], "day": "2026-05-04"},
        {"n": 8, "body": texts[3], "day": None},
        {"body": texts[4], "source": "d.txt"},
    ]


def test_a_text_field_called_source_keeps_its_text(tmp_path: Path) -> None:
    """The name of the file goes under the same key, and gives way."""
    (tmp_path / "a.txt").write_text(GERMAN)
    filter_files([tmp_path / "a.txt"], tmp_path / "out", FilterPlan.of({"duplicates": "exact"}), text_field="source")
    assert kept(tmp_path / "out") == [{"source": GERMAN}]


def test_the_same_is_kept_whatever_the_batches_and_parts(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = FilterPlan.read("default")
    filter_files([mixed], tmp_path / "one", plan)
    monkeypatch.setattr(filtering, "_BATCH_DOCUMENTS", 1)
    filter_files([mixed], tmp_path / "many", plan, part_bytes=5000)
    assert kept(tmp_path / "one") == kept(tmp_path / "many")
    assert len(read_report(tmp_path / "many")["outputs"]) > 2
    one, many = (read_report(tmp_path / name)["dropped"] for name in ("one", "many"))
    assert one == many


def test_a_word_of_megabytes(tmp_path: Path) -> None:
    """As data in base64 is, among text that repeats itself."""
    text = f"{GERMAN} {'QUJD' * 100_000} {GERMAN}"
    file = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    filter_files([file], tmp_path / "out", FilterPlan.of({"rules": {"mean_word_length": {}}}))
    assert kept(tmp_path / "out") == [{"text": text}]


def test_technical_text_is_not_thrown_away(tmp_path: Path) -> None:
    root = Path(json.__file__).parent
    code = [path.read_text() for path in sorted(root.glob("*.py"))]
    table = "\n".join(f"| {n:#06x} | {n * 17 % 256:3} | `reg_{n}` |" for n in range(200))
    listing = "\n".join(f"-rw-r--r-- 1 root root {n * 977} Jan {n % 28 + 1} file_{n}.so.{n}" for n in range(100))
    texts = [*topics(60, characters=6000), *code, table, listing]
    source = write_lines(tmp_path / "technical.jsonl", [{"text": text} for text in texts])
    left = {
        rules: filter_files([source], tmp_path / rules, FilterPlan.read(rules, duplicates="keep")).kept.documents
        for rules in ("default", "gopher")
    }
    assert left["default"] >= len(texts) - 1
    assert left["gopher"] < 0.9 * len(texts)


def test_samples_are_bounded_and_the_same_each_time(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "junk.jsonl", [{"text": f"junk {n}"} for n in range(50)] + [{"text": GERMAN}])
    for name in ("one", "two"):
        filter_files([source], tmp_path / name, FilterPlan.read("default"))
    one, two = (read_report(tmp_path / name)["dropped"]["words"] for name in ("one", "two"))
    assert one == two
    assert one["documents"] == 50
    assert len(one["samples"]) == SAMPLES
    assert len({sample["where"] for sample in one["samples"]}) == SAMPLES


def test_an_empty_result_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "junk.jsonl", [{"text": f"junk {n}"} for n in range(5)])
    said = refusal(command, source, "--out", tmp_path / "out")
    assert "no document of" in said
    assert "of 5 documents were dropped by words 5; loosen these with --rules FILE" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junk.jsonl"]
    (tmp_path / "nothing.jsonl").write_text("\n")
    assert "there is no document in" in refusal(command, tmp_path / "nothing.jsonl", "--out", tmp_path / "o")


def test_a_result_within_its_source_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "some.jsonl", [{"text": GERMAN}])
    for out in (tmp_path / "out", tmp_path):
        assert "lies in the source" in refusal(command, source, tmp_path, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["some.jsonl"]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "bad.txt").write_bytes(b"good \xff\xfe")
    assert "is not UTF-8" in refusal(command, tmp_path / "bad.txt", "--out", out)
    source = write_lines(tmp_path / "some.jsonl", [{"text": GERMAN}, {"body": "x"}])
    assert run_command(command, source, tmp_path / "bad.txt", "--out", tmp_path / "both", "--skip-bad") == 0
    assert read_report(tmp_path / "both")["left_out"]["bad_records"] == 2
    assert f"; 2 bad records left out (first: {source}:2 has no text under 'text';" in capsys.readouterr().out
    assert "it has body: name one with" in refusal(command, source, "--out", out)
    assert run_command(command, source, "--out", out, "--skip-bad") == 0
    assert read_report(out)["left_out"]["bad_records"] == 1
    assert "is there already; name a new folder" in refusal(command, source, "--out", out)
    (tmp_path / "ids.bin").write_bytes(bytes(100))
    assert "holds token ids" in refusal(command, tmp_path / "ids.bin", "--out", tmp_path / "o")
    pq.write_table(pa.table({"text": [GERMAN], "raw": [b"\x00"]}), tmp_path / "raw.parquet")
    assert "a field that JSON cannot hold: bytes" in refusal(command, tmp_path / "raw.parquet", "--out", tmp_path / "o")
    monkeypatch.setattr(filtering, "MOST_CHARACTERS", 10)
    with pytest.raises(LimitExceeded, match=r"some.jsonl:1 has over .* part it"):
        filter_files([source], tmp_path / "o", FilterPlan.read("default"))
    assert not (tmp_path / "o").exists()


def test_ctrl_c_leaves_nothing_and_says_so(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: FilterProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filter_files([mixed], tmp_path / "out", FilterPlan.read("default"), on_progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed.jsonl"]
    monkeypatch.setattr(command, "_filtered", lambda *_: stop(FilterProgress(0, 0, 0, 0, 0)))
    with pytest.raises(KeyboardInterrupt):
        run_command(command, mixed, "--out", tmp_path / "out")
    assert "stopped: nothing is kept" in capsys.readouterr().err


def test_a_folder_that_appears_meanwhile_is_not_overwritten(mixed: Path, tmp_path: Path) -> None:
    def other(_: FilterProgress) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()

    with pytest.raises(AlreadyExists):
        filter_files([mixed], tmp_path / "out", FilterPlan.read("default"), on_progress=other)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_report_is_read_from_a_filters_folder_alone(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"holds no {FILTER_REPORT}; name a folder"):
        read_report(tmp_path)
    (tmp_path / FILTER_REPORT).write_text("{}")
    with pytest.raises(InvalidInput, match="is not what `potstill filter` writes"):
        read_report(tmp_path)
