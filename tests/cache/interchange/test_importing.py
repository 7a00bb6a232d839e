"""What the figures of an import compare with: what was imported, and not the teacher."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.targets.commit import commit_bytes, commit_name
from potstill.cache.upkeep.inspect_html import page
from potstill.cache.upkeep.inspection import inspect_cache
from tests.support.command_line import run
from tests.support.corpora import byte_tokenizer, teacher_for
from tests.support.filled_caches import commit as commit_shards
from tests.support.parquet_files import TEACHER, K, everything, export, foreign, make_small, make_targets, scored, take

UNKNOWN = {"what": "what was imported, of unknown error", "max_abs_error": None, "shards": 1}
FROM_U8 = {"what": "what was imported: u8, within 0.0635 of the teacher", "max_abs_error": 0.0635, "shards": 1}
FROM_TEACHER = {"what": "the teacher", "max_abs_error": 0.0, "shards": 4}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def about(root: Path) -> dict[str, Any]:
    """Inspect the only target set, as `inspect --json` does."""
    found: dict[str, Any] = inspect_cache(Cache.open(root)).to_json["targets"]["fake"]["docs"]
    return found


@pytest.mark.parametrize("encoding", ["u8", "archive", pytest.param("f16", marks=pytest.mark.slow), "f32"])
def test_figures_of_an_imported_export_are_of_what_was_imported_with_its_bound_beside(
    tmp_path: Path, tokenizer: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = make_targets(tmp_path / "a", encoding="u8")
    assert about(tmp_path / "a")["measured_against"] == [FROM_TEACHER]
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    assert run(*take(tmp_path / "files", tmp_path / "b", tokenizer, "--encoding", encoding)) == 0
    found = about(tmp_path / "b")
    assert found["measured_against"] == found["sets"][0]["measured_against"] == [FROM_U8]
    imported, stored = everything(targets), everything(Cache.open(tmp_path / "b").targets("fake", "docs"))
    difference = np.abs(np.sort(stored.logprobs) - np.sort(imported.logprobs)).max()
    assert found["measured_error"]["max_abs"] == pytest.approx(difference, abs=1e-6)
    capsys.readouterr()
    assert run("inspect", tmp_path / "b", "--html", tmp_path / "page.html") == 0
    told = capsys.readouterr().out
    assert "what was imported: u8, within 0.0635 of the teacher" in told
    assert "fake, import of u8 within 0.0635" in told
    shown = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.search(r"<td>\s*what was imported: u8, within 0\.0635 of the teacher", shown)


def test_an_export_of_exact_targets_is_measured_against_the_teacher(tmp_path: Path, tokenizer: Path) -> None:
    targets = make_targets(tmp_path / "a", encoding="f32")
    assert run(*export(tmp_path / "a", tmp_path / "files")) == 0
    assert run(*take(tmp_path / "files", tmp_path / "b", tokenizer)) == 0
    found, corpus = about(tmp_path / "b"), targets.corpus
    assert found["measured_against"] == [{**FROM_TEACHER, "shards": 1}]
    exact = scored(teacher_for(corpus), corpus, range(len(corpus)), Fields(k=K))
    stored = everything(Cache.open(tmp_path / "b").targets("fake", "docs"))
    assert found["measured_error"]["max_abs"] == pytest.approx(np.abs(stored.logprobs - exact.logprobs).max(), abs=1e-6)


def test_an_import_of_an_import_adds_up_the_bounds_and_an_unknown_error_stays_unknown(
    tmp_path: Path, tokenizer: Path
) -> None:
    make_targets(tmp_path / "a", encoding="u8")
    for source, root in (("a", "b"), ("b", "c")):
        assert run(*export(tmp_path / source, tmp_path / f"{source}-files")) == 0
        assert run(*take(tmp_path / f"{source}-files", tmp_path / root, tokenizer, "--encoding", "u8")) == 0
    (twice,) = about(tmp_path / "c")["measured_against"]
    assert twice["what"] == "what was imported: u8, then u8, within 0.127 of the teacher"
    assert twice["max_abs_error"] == pytest.approx(0.127)
    assert run(*take(foreign(tmp_path / "theirs" / "x.parquet"), tmp_path / "d", tokenizer, *TEACHER)) == 0
    assert about(tmp_path / "d")["measured_against"] == [UNKNOWN]
    assert run(*export(tmp_path / "d", tmp_path / "d-files")) == 0
    assert run(*take(tmp_path / "d-files", tmp_path / "e", tokenizer)) == 0
    assert about(tmp_path / "e")["measured_against"] == [UNKNOWN]


def test_what_distillkit_columns_lost_is_of_unknown_error_also_in_our_own_export(
    tmp_path: Path, tokenizer: Path
) -> None:
    make_targets(tmp_path / "a", encoding="f32")
    assert run(*export(tmp_path / "a", tmp_path / "files", "--format", "distillkit")) == 0
    assert run(*take(tmp_path / "files", tmp_path / "b", tokenizer, "--format", "distillkit")) == 0
    assert about(tmp_path / "b")["measured_against"] == [UNKNOWN]


def test_shards_that_were_imported_and_shards_of_the_teacher_stand_beside_each_other(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_targets(tmp_path / "a", encoding="u8")
    cache, corpus = make_small(tmp_path / "b")
    assert run(*export(tmp_path / "a", tmp_path / "files", "--shards", "1:3")) == 0
    assert run(*take(tmp_path / "files", tmp_path / "b", tokenizer)) == 0
    targets = cache.targets("fake", "docs")
    commit_shards(targets, teacher_for(corpus), (0, 3))
    assert targets.sets[0].commits.fold()
    told = about(tmp_path / "b")["measured_against"]
    assert sorted((each["max_abs_error"], each["shards"]) for each in told) == [(0.0, 2), (0.0635, 2)]
    assert run("verify", tmp_path / "b") == 0
    # The corpus is one shard of the next import, which is as good as the worst file.
    assert run(*export(tmp_path / "b", tmp_path / "again")) == 0
    assert run(*take(tmp_path / "again", tmp_path / "c", tokenizer)) == 0
    (against,) = about(tmp_path / "c")["measured_against"]
    assert against["what"] == "what was imported: u8, then u8, within 0.127 of the teacher"
    capsys.readouterr()
    assert run("inspect", tmp_path / "b") == 0
    assert "2 shards: the teacher" in " ".join(capsys.readouterr().out.split())


def test_bounds_that_an_earlier_compact_added_up_are_not_shown_as_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = make_targets(tmp_path / "a", encoding="u8")
    for commit in targets.sets[0].commits.all():
        old = {**commit.error, "max_abs": 0.1041, "mean_abs": 0.08, "mean_kl": 6.4e-2, "p999_kl": 0.0637}
        made = replace(commit.provenance, capture_path="fake, journal")
        path = tmp_path / "a" / targets.sets[0].path / "commits" / commit_name(commit.shard)
        path.write_bytes(commit_bytes(replace(commit, error=old, provenance=made)))
    found = about(tmp_path / "a")
    assert set(found["measured_error"]) == {"saturated", "saturated_mass"}
    (against,) = found["measured_against"]
    assert (against["what"], against["shards"]) == ("not measured: an earlier compact added bounds", 4)
    assert run("inspect", tmp_path / "a") == 0
    told = capsys.readouterr().out
    assert "not measured: an earlier compact added bounds" in told
    assert "0.1041" not in told
    cache = Cache.open(tmp_path / "a")
    assert "0.1041" not in page(cache, inspect_cache(cache))
