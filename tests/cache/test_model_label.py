"""A model's name is a label: what was kept under one name answers under another, of the same weights only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.cache import Cache, Fields
from potstill.cache.errors import SpecMismatch
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.types import TeacherIdentity, Tokens
from potstill.clients.cli import main
from tests.golden.make import JOURNAL_ROW, K
from tests.support.fakes import FakeTeacher
from tests.support.paths import GOLDEN

FORMATS = sorted(GOLDEN.glob("format-*"))
WANT = Fields(k=K)


@pytest.fixture(params=FORMATS, ids=lambda root: root.name)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    """A cache that was written when the name was compared."""
    return Cache.open(shutil.copytree(request.param, tmp_path / "c"), mode="r+")


@pytest.fixture
def kept(cache: Cache) -> TeacherIdentity:
    return cache.targets("u8", "docs").identity


async def num_scored(cache: Cache, name: str, identity: TeacherIdentity, row: Tokens) -> int:
    """How many rows the teacher is asked for when the cache in front of it is asked for one."""
    teacher = FakeTeacher(identity)
    async with CachedTeacher.open(teacher, name=name, cache=cache, policy=KeepPolicy(k=K)) as cached:
        await cached.score([row], WANT)
    return len(teacher.scored)


async def test_a_renamed_model_is_answered_from_what_was_kept(cache: Cache, kept: TeacherIdentity) -> None:
    renamed = replace(kept, model="renamed")
    assert await num_scored(cache, "asked", renamed, JOURNAL_ROW) == 0
    assert await num_scored(cache, "u8", renamed, cache.corpus("docs").row(0)) == 0


async def test_a_renamed_model_fills_on(cache: Cache, kept: TeacherIdentity, tmp_path: Path) -> None:
    teacher = FakeTeacher(replace(kept, model="renamed"))
    begun = tmp_path / "c" / "targets" / "u8" / "docs"
    (begun / "manifest.json").unlink(missing_ok=True)
    (begun / "commits" / "000001.json").unlink()
    record = (begun / "zarr.json").read_bytes()
    report = await fill(teacher, cache.plan_targets("u8", "docs", teacher.identity, fields=WANT), FillPlan())
    assert (report.shards_before, report.shards_committed) == (2, 1)
    assert (begun / "zarr.json").read_bytes() == record
    # A further segment set is written with the name of now, and read together with the first.
    later = (
        Fields(k=0, temperatures=(4.0,)) if len(cache.targets("u8", "docs").sets) == 1 else Fields(k=K, draws=6, seed=1)
    )
    await fill(teacher, cache.plan_targets("u8", "docs", teacher.identity, fields=later), FillPlan())
    targets = Cache.open(tmp_path / "c").targets("u8", "docs")
    assert targets.committed.all()
    assert targets.identity.model == kept.model
    targets.read(0, targets.corpus.num_positions)
    assert main(["verify", str(tmp_path / "c")]) == 0


async def test_other_weights_of_the_same_name_are_another_teacher(cache: Cache, kept: TeacherIdentity) -> None:
    retrained = replace(kept, weights_sha256="e" * 64)
    with pytest.raises(SpecMismatch, match=f"weights_sha256: '{kept.weights_sha256}' != '{'e' * 64}'"):
        cache.plan_targets("u8", "docs", retrained, fields=WANT)
    assert await num_scored(cache, "asked", retrained, JOURNAL_ROW) == 1
    assert await num_scored(cache, "u8", retrained, cache.corpus("docs").row(0)) == 1


async def test_weights_that_nobody_knows_are_told_apart_by_name(cache: Cache, kept: TeacherIdentity) -> None:
    row = cache.corpus("docs").row(0)
    imported = replace(kept, weights_sha256="unknown")
    targets = cache.plan_targets("imported", "docs", imported, fields=WANT)
    await fill(FakeTeacher(imported), targets, FillPlan())
    assert await num_scored(cache, "imported", imported, row) == 0
    other = replace(imported, model="other")
    with pytest.raises(SpecMismatch, match=f"model: '{kept.model}' != 'other'"):
        cache.plan_targets("imported", "docs", other, fields=WANT)
    assert await num_scored(cache, "imported", other, row) == 1
    with pytest.raises(SpecMismatch, match="weights_sha256: 'unknown' != "):
        cache.plan_targets("imported", "docs", kept, fields=WANT)
