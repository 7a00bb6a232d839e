"""`inspect`: what it counts, and a page that anybody can open."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from markupsafe import escape

from potstill.cache import Cache, Fields
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.upkeep.charts import Axis
from potstill.cache.upkeep.inspect_html import coverage_marks, page
from potstill.cache.upkeep.inspection import inspect_cache
from potstill.clients.cli import main
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.fakes import FakeTeacher, fake_identity


@pytest.fixture(scope="module")
def root(flip_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect") / "c"
    copytree(flip_cache, root)
    return root


def test_the_keys_that_others_read_are_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"corpora", "targets", "journals", "unreadable"}
    assert {"rows", "positions", "shards", "tokenizer_sha256"} <= set(found["corpora"]["a"])
    about = found["targets"]["one"]["a"]
    wanted = {"identity", "fields", "encoding", "shards_committed", "shards", "bytes", "bytes_per_position"}
    assert wanted <= set(about)
    assert set(about["encoding"]) == {"name", "max_abs_error"}
    assert about["fields"] == Fields(k=6, draws=5, seed=3, entropy=True).to_json()


def test_segment_sets_stand_beside_each_other(root: Path) -> None:
    cache = Cache.open(root)
    sets = inspect_cache(cache).to_json["targets"]["one"]["a"]["sets"]
    assert [(each["name"], each["folded"]) for each in sets] == [("first", True), ("draws-5_entropy", False)]
    for each, opened in zip(sets, cache.targets("one", "a").sets, strict=True):
        assert (
            each["bytes"]
            == sum(commit.num_bytes for commit in opened.commits.all())
            == sum(each["array_bytes"].values())
        )
        assert each["shards_committed"] == each["shards"] == len(opened.commits.all())
        assert each["provenance"][0]["engine_version"] == "1"
        assert each["first_captured"] <= each["last_captured"]
    assert sets[0]["measured_error"]["max_abs"] <= sets[0]["encoding"]["max_abs_error"]


def test_annotations_and_journals_are_counted(root: Path) -> None:
    found = inspect_cache(Cache.open(root)).to_json
    assert {name: about["dtype"] for name, about in found["corpora"]["a"]["annotations"].items()} == {
        "held-out": "int64",
        "split": "int64",
    }
    assert found["corpora"]["a"]["annotations"]["split"]["provenance"] == {"source": "split"}
    assert found["journals"]["one"]["rows"] == 4
    assert found["journals"]["one"]["bytes"] > 0


def test_the_tables_have_all_of_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(root)]) == 0
    told = capsys.readouterr().out
    for words in ("held-out, split", "draws-5_entropy", "log Z at 0.5, 2", "fake 1", "journals", "3/3"):
        assert words in told


def test_what_cannot_be_read_is_named_and_the_rest_is_counted(
    flip_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, drawn = tmp_path / "c", tmp_path / "page.html"
    copytree(flip_cache, root)
    commit = next((root / "targets/one/a").rglob("draws-5_entropy/commits/000001.json"))
    journal = next(root.rglob("journal*/**/*.json"))
    for record in (commit, journal):
        record.write_bytes(record.read_bytes()[:-40])
    assert main(["inspect", str(root), "--json", "--html", str(drawn)]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [each["shards_committed"] for each in found["targets"]["one"]["a"]["sets"]] == [3, 2]
    assert len(found["unreadable"]) == 2
    for line, record in zip(found["unreadable"], (commit, journal), strict=True):
        assert record.relative_to(root).as_posix() in line
        assert f"not counted above: {line}" in told.err
        assert str(escape(line)) in drawn.read_text()
    assert f"potstill verify {root}" in told.err
    (root / "corpora/a/zarr.json").write_text("{}")
    assert main(["inspect", str(root)]) == 1
    told = capsys.readouterr()
    assert "corpora/a/zarr.json" in told.err
    assert "there is no corpus" not in told.out


class Page(HTMLParser):
    """Collects what a page would load or run, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "onload")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def test_the_page_stands_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(root), "--html", str(tmp_path / "page.html")]) == 0
    assert "segment sets" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = parsed(text)
    assert found.references == []
    assert not {"script", "link", "iframe", "img"} & set(found.tags)
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    assert text.count('<polyline class="s0"') == 4
    assert ">0.0635<" in text
    assert main(["inspect", str(root), "--html", str(tmp_path / "no" / "page.html")]) == 1
    assert capsys.readouterr().err.startswith("store: ")


def test_a_hostile_name_is_text_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    evil = "<script>alert(1)</script>[bold]\"'"
    identity = fake_identity(vocab_size=256, tokenizer_sha256=corpus.tokenizer_sha256, model=evil)
    write_first_shard(cache, FakeTeacher(identity))
    text = page(cache, inspect_cache(cache))
    parsed(text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[bold]&#34;&#39;" in text
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert evil in capsys.readouterr().out


def write_first_shard(cache: Cache, teacher: FakeTeacher) -> None:
    import asyncio

    from potstill.cache.types import Targets

    corpus = cache.corpus("docs")
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=4))
    exact = asyncio.run(teacher.score(corpus.rows(0, int(corpus.shard_rows[1])), Fields(k=4)))
    assert targets.write_shard(0, Targets.concat(exact), teacher.provenance)


def test_a_target_set_without_a_shard_yet_has_a_page(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    parsed(page(cache, inspect_cache(cache)))
    write_first_shard(cache, teacher_for(corpus))
    for path in (tmp_path / "c").glob("targets/fake/docs/commits/*.json"):
        path.unlink()
    cache = Cache.open(tmp_path / "c")
    assert inspect_cache(cache).to_json["targets"]["fake"]["docs"]["bytes_per_position"] is None
    assert "nothing yet" in page(cache, inspect_cache(cache))


@pytest.mark.parametrize("shards", [1, 7, 240, 100_000])
def test_a_strip_stays_small_and_shows_gaps(shards: int) -> None:
    covered = np.arange(shards) % 2 == 0
    covered[shards // 2 :] = False
    covered[0] = True
    marks = coverage_marks(covered)
    bins = min(shards, 240)
    assert len(marks) <= bins
    assert marks[0].start == 0
    assert marks[-1].start + marks[-1].width <= bins // 2 + 1
    assert coverage_marks(np.zeros(shards, dtype=bool)) == []


@pytest.mark.parametrize("shards", [3, 100])
def test_few_shards_have_their_errors_in_the_table_and_many_a_histogram(tmp_path: Path, shards: int) -> None:
    import asyncio

    cache, corpus = make_corpus(tmp_path / "c", texts=topics(8), shard_positions=1 << 20 if shards == 3 else 100)
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=4)), FillPlan()))
    text = page(cache, inspect_cache(cache))
    assert ("<figcaption>t on docs, first</figcaption>" in text) == (shards == 100)
    assert re.search(r'>0\.0635</td><td class="number">0\.\d+', text)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([9.82, 11.02], ["9.5", "10.0", "10.5", "11.0", "11.5"]),
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.0, 3e-5], ["0", "1.0e-05", "2.0e-05", "3.0e-05"]),
        ([0, 76], ["0", "20", "40", "60", "80"]),
        ([5.0, 5.0], ["5", "6"]),
        ([0.0], ["0", "0.2"]),
    ],
)
def test_ticks_are_round_and_hold_all_values(values: list[float], texts: list[str]) -> None:
    axis = Axis.around("", values)
    assert [text for _, text in axis.ticks] == texts
    assert axis.low <= min(values) <= max(values) <= axis.high


def test_an_empty_root_says_what_makes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 0
    assert "`potstill ingest` makes one" in capsys.readouterr().out
