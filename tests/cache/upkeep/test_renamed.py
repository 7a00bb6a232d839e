from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from potstill.cache import Cache, Fields
from potstill.cache.types import TeacherIdentity
from potstill.cache.upkeep.renamed import StoredIdentity, renamed_line, stored_identities
from tests.support.corpora import make_corpus, teacher_for
from tests.support.fakes import fake_identity
from tests.support.filled_caches import commit


def fill(cache: Cache, name: str, *, model: str) -> TeacherIdentity:
    """Targets of one shard of `docs`; returns whose they are."""
    teacher = teacher_for(cache.corpus("docs"), model=model)
    targets = cache.plan_targets(name, "docs", teacher.identity, fields=Fields(k=4))
    commit(targets, teacher, [0])
    return teacher.identity


def line(cache: Cache, name: str, identity: TeacherIdentity) -> str:
    return renamed_line(name, identity, stored_identities(cache.root))


def test_targets_of_the_same_weights_under_another_model_name_are_told(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "c")
    before = fill(cache, "big", model="smol-old")
    assert line(cache, "big", before) == ""
    now = replace(before, model="smol-new")
    told = line(cache, "big", now)
    assert "model 'smol-new'" in told
    assert "model 'smol-old' (teacher 'big', corpora docs)" in told
    assert "serve the weights as 'big' from a folder named 'smol-old'" in told
    assert "\n" not in told
    # Also under another teacher name, while nothing is there under the new one.
    assert "as 'big' from a folder named 'smol-old'" in line(cache, "large", now)


def test_what_differs_beside_the_name_is_told_for_serving_under_it_alone_would_be_refused() -> None:
    before = replace(fake_identity(model="old"), dtype="bfloat16")
    now = fake_identity(model="new")
    stored = [StoredIdentity("big", "docs", before)]
    told = renamed_line("big", now, stored)
    assert "a folder named 'old' and mend what differs beside the name (now != stored: dtype: 'float32' != '" in told
    assert "'bfloat16'), else fill under a new teacher name" in told
    assert "differs beside the name" not in renamed_line("big", replace(now, dtype="bfloat16"), stored)
    # Of targets that need it and targets that do not, the latter are told of.
    stored.append(StoredIdentity("big", "wiki", replace(before, dtype="float32")))
    told = renamed_line("big", now, stored)
    assert "(teacher 'big', corpora wiki)" in told
    assert "differs beside the name" not in told


def test_a_name_on_the_hub_is_not_told_as_a_folder() -> None:
    stored = [StoredIdentity("big", "docs", fake_identity(model="HuggingFaceTB/SmolLM2-135M"))]
    told = renamed_line("big", fake_identity(model="SmolLM2-135M"), stored)
    assert "serve the weights as 'big' by the model name 'HuggingFaceTB/SmolLM2-135M', else" in told
    assert "folder" not in told


def test_other_weights_and_other_tokenizers_are_other_teachers(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "c")
    now = replace(fill(cache, "big", model="old"), model="new")
    assert line(cache, "big", replace(now, weights_sha256="e" * 64)) == ""
    assert line(cache, "big", replace(now, tokenizer_sha256="e" * 64)) == ""
    assert line(cache, "big", replace(now, weights_sha256="unknown")) == ""
    assert line(Cache.open(tmp_path / "empty", mode="r+"), "big", now) == ""


def test_weights_that_are_kept_under_two_names_on_purpose_are_not_told_of(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "c")
    one = fill(cache, "one", model="one")
    two = fill(cache, "two", model="two")
    assert (line(cache, "one", one), line(cache, "two", two)) == ("", "")
    # But exchanged, neither can be filled.
    assert "folder named 'one'" in line(cache, "one", two)


def test_a_damaged_record_is_passed_over(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "c")
    now = replace(fill(cache, "big", model="old"), model="new")
    (tmp_path / "c" / "targets" / "big" / "docs" / "zarr.json").write_text("{}")
    fill(cache, "other", model="old")
    assert [each.teacher for each in stored_identities(cache.root)] == ["other"]
    assert "(teacher 'other', corpora docs)" in line(cache, "big", now)
