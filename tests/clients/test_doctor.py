"""Every check of `potstill doctor`, with the part that it looks at in order, and really broken."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.errors import LimitExceeded
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import Teacher, TeacherLimits, Tokens
from potstill.clients.doctor.cache_checks import CorpusFacts, check_stored, store_findings, vocabulary_findings
from potstill.clients.doctor.examine import Patient, examine
from potstill.clients.doctor.findings import Finding
from potstill.clients.doctor.service_checks import ServiceFacts, check_cached, check_service
from potstill.clients.doctor.teacher_checks import Probing, check_teacher
from potstill.teacher_service.hosting.hosted_teacher import Keep
from tests.support.command_line import run
from tests.support.corpora import make_corpus, plan_targets, teacher_for, topics
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.findings import PROBING, failed, levels
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tokenizers.small import trained
from tests.support.tokenizers.two_corpora import ingested, projected, taught, write


class Limited(FakeTeacher):
    """With limits like an engine's: K of 16, rows of 30 tokens."""

    max_top_k = 16
    max_row_tokens = 30

    @property
    def limits(self) -> TeacherLimits:
        return TeacherLimits(max_top_k=self.max_top_k, max_row_tokens=self.max_row_tokens)

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        self.refuse(rows, want)
        return await super().score(rows, want)

    def refuse(self, rows: Sequence[Tokens], want: Fields) -> None:
        if want.k > self.max_top_k or any(len(row) > self.max_row_tokens for row in rows):
            raise LimitExceeded("over this teacher's limits")


class NoLimits(Limited):
    def refuse(self, rows: Sequence[Tokens], want: Fields) -> None:
        pass


class Late(FakeTeacher):
    """Answers what vLLM calls prompt logprobs i as target i: the distribution before the token."""

    def targets(self, row: Tokens, want: Fields) -> Targets:
        right = super().targets(row, want)
        return Targets.concat([right[:1], right[:-1]])


class LateTopK(FakeTeacher):
    """Only its top-k is late; the labels are right."""

    def targets(self, row: Tokens, want: Fields) -> Targets:
        right = super().targets(row, want)
        late = Targets.concat([right[:1], right[:-1]])
        return replace(late, label_logprob=right.label_logprob)


class Early(FakeTeacher):
    """Target i is of the position after it."""

    def targets(self, row: Tokens, want: Fields) -> Targets:
        right = super().targets(row, want)
        return Targets.concat([right[1:], right[-1:]])


class Drifting(FakeTeacher):
    """Every other answer comes from a replica whose numbers are `nats` off."""

    nats = 0.3

    def targets(self, row: Tokens, want: Fields) -> Targets:
        right = super().targets(row, want)
        if len(self.scored) % 2:
            return right
        return replace(right, logprobs=right.logprobs - np.float32(self.nats))


class Unnormalised(FakeTeacher):
    def targets(self, row: Tokens, want: Fields) -> Targets:
        right = super().targets(row, want)
        return replace(right, logprobs=right.logprobs - np.float32(0.1))


class Unseeded(FakeTeacher):
    """Draws others each time."""

    def targets(self, row: Tokens, want: Fields) -> Targets:
        return super().targets(row, replace(want, seed=len(self.scored)) if want.draws else want)


class Moving(FakeTeacher):
    """A teacher that is exchanged under its name."""

    moved = False

    def dense_logprobs(self, row: Tokens) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        return super().dense_logprobs((row + 1) % 64 if self.moved else row)


def look_at(teacher: Teacher) -> list[Finding]:
    return asyncio.run(check_teacher(teacher, "smol", PROBING))


def test_a_teacher_in_order_passes_every_check() -> None:
    assert levels(look_at(Limited())) == {
        "mass and order": "ok",
        "offsets": "ok",
        "replicas agree": "ok",
        "same draws again": "ok",
        "K limit": "ok",
        "row limit": "ok",
    }


def test_what_a_teacher_does_not_have_is_not_run() -> None:
    seen = levels(look_at(FakeTeacher(top_k_only=True)))
    assert seen["same draws again"] == "not run"
    assert seen["row limit"] == "not run"
    assert "fail" not in seen.values()


@pytest.mark.parametrize(
    ("teacher", "says"),
    [(Late(), "nats"), (LateTopK(), "label"), (Early(), "nats")],
    ids=["late", "late-top-k", "early"],
)
def test_a_teacher_that_is_off_by_one_is_found(teacher: Teacher, says: str) -> None:
    finding = failed(look_at(teacher))
    assert finding.check == "offsets"
    assert says in finding.detail


def test_replicas_that_disagree_are_found_and_told_in_nats() -> None:
    finding = next(finding for finding in look_at(Drifting()) if finding.check == "replicas agree")
    assert finding.level == "fail"
    assert "differs by 0.3 nats at most, over 0.05" in finding.detail


def test_probabilities_that_do_not_add_up_are_found() -> None:
    finding = next(finding for finding in look_at(Unnormalised()) if finding.check == "mass and order")
    assert finding.level == "fail"
    assert "more or less than 1" in finding.detail


def test_draws_that_change_are_told() -> None:
    assert levels(look_at(Unseeded()))["same draws again"] == "warn"


def test_limits_that_do_not_hold_are_found() -> None:
    seen = levels(look_at(NoLimits()))
    assert (seen["K limit"], seen["row limit"]) == ("fail", "fail")


def test_a_long_row_is_not_scored_only_to_look() -> None:
    teacher = Limited()
    [finding] = [
        finding
        for finding in asyncio.run(check_teacher(teacher, "smol", Probing(row_tokens=12, max_probe_tokens=20)))
        if finding.check == "row limit"
    ]
    assert "one of 30 was not tried" in finding.detail
    assert max(map(len, teacher.scored)) <= 4 * 13


def test_a_teacher_without_the_corpus_tokenizer_is_found() -> None:
    identity = fake_identity(vocab_size=70, tokenizer_sha256="a" * 64)
    fits = CorpusFacts(name="docs", tokenizer_sha256="a" * 64, vocab_size=64)
    other = replace(fits, name="code", tokenizer_sha256="b" * 64)
    [finding] = vocabulary_findings("smol", identity, [fits])
    assert (finding.level, finding.subject) == ("ok", "smol on docs")
    assert "6 more rows as padding" in finding.detail
    assert failed(vocabulary_findings("smol", identity, [other])).detail.endswith("ids do not mean the same")
    assert [f.level for f in vocabulary_findings("smol", identity, [fits, other])] == ["ok", "warn"]
    with_targets = replace(other, teachers=("smol",))
    assert [f.level for f in vocabulary_findings("smol", identity, [fits, with_targets])] == ["ok", "fail"]
    large = replace(fits, vocab_size=71)
    assert "71 ids, the teacher's head only 70" in failed(vocabulary_findings("smol", identity, [large])).detail
    assert [f.level for f in vocabulary_findings("smol", identity, [])] == ["not run"]


def test_a_cache_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    root = tmp_path / "c"
    make_corpus(root)
    [written, room] = asyncio.run(examine(Patient(cache=str(root)), PROBING))
    assert (written.check, written.level) == ("write access", "ok")
    assert (room.check, room.level) == ("room", "ok")
    temporary = root / ".potstill-tmp"
    temporary.rmdir()
    temporary.write_text("in the way, as on a read-only disk")
    finding = failed(asyncio.run(examine(Patient(cache=str(root)), PROBING)))
    assert finding.check == "write access"


def test_a_full_disk_is_found() -> None:
    assert levels(store_findings("c", "", 2**20, None))["room"] == "fail"
    assert levels(store_findings("c", "", 2**34, 2**35))["room"] == "warn"
    assert levels(store_findings("c", "", None, None))["room"] == "not run"


def test_a_cache_that_is_not_there_is_found(tmp_path: Path) -> None:
    assert failed(asyncio.run(examine(Patient(cache=str(tmp_path / "none")), PROBING))).check == "cache"


def test_stored_targets_of_a_teacher_that_moved_are_found(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    assert levels(asyncio.run(check_stored(cache, "fake", teacher, 0.05))) == {"stored = live": "not run"}
    asyncio.run(fill(teacher, plan_targets(cache, teacher), FillPlan()))
    assert levels(asyncio.run(check_stored(cache, "fake", teacher, 0.05))) == {"stored = live": "ok"}
    moved = Moving(teacher.identity)
    moved.moved = True
    assert "nats at most" in failed(asyncio.run(check_stored(cache, "fake", moved, 0.05))).detail
    other = FakeTeacher(replace(teacher.identity, weights_sha256="e" * 64))
    assert "of another teacher" in failed(asyncio.run(check_stored(cache, "fake", other, 0.05))).detail


def test_projected_targets_are_no_fault(tmp_path: Path) -> None:
    """Their tokenizer is not the teacher's, and no answer of it is one of them."""
    cache = Cache.open(tmp_path / "c", mode="r+")
    text = write(tmp_path / "text", topics(2, characters=300))
    ingested(cache, "students", text, trained(topics(20), 400))
    teachers = ingested(cache, "teachers", text, trained(topics(20), 330))
    own = taught(cache, teachers)
    projected(cache)
    teacher = FakeTeacher(own.identity)
    facts = [CorpusFacts.of(cache.fresh(), name) for name in ("students", "teachers")]
    assert {each.level for each in vocabulary_findings("fake", teacher.identity, facts)} == {"ok"}
    found = asyncio.run(check_stored(cache.fresh(), "fake", teacher, 0.05))
    assert [each.level for each in found] == ["not run", "ok"]


def test_a_service_in_order_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    with serving_teachers(hosted("smol", teacher, Keep(cache, KeepPolicy(k=8))), cache=cache) as url:
        status = run("doctor", "--url", url, "--json")
        answer = json.loads(capsys.readouterr().out)
        assert (status, answer["ok"]) == (0, True)
        seen = {finding["check"]: finding["level"] for finding in answer["findings"]}
        told = {check for check, level in seen.items() if level == "ok"}
        assert told == {
            "service",
            "wire version",
            "clock",
            "access",
            "memory",
            "write access",
            "room",
            "tokenizer",
            "mass and order",
            "offsets",
            "replicas agree",
            "same draws again",
            "K limit",
            "kept = live",
        }
        assert {check for check, level in seen.items() if level == "not run"} == {"GPU memory", "row limit"}
        assert run("doctor", "--url", url) == 0
        assert "kept and live differ by" in " ".join(capsys.readouterr().out.split())


def test_a_broken_teacher_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with serving_teachers(hosted("smol", Late())) as url:
        assert run("doctor", "--url", url) == 1
        assert "fill nothing from this teacher" in " ".join(capsys.readouterr().out.split())
        assert run("doctor", "--teacher", f"smol={url}#smol", "--json") == 1
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert [finding["check"] for finding in findings if finding["level"] == "fail"] == ["offsets"]


def test_kept_answers_of_a_teacher_that_moved_are_found(tmp_path: Path) -> None:
    keep = Keep(Cache.open(tmp_path / "c", mode="r+"), KeepPolicy(k=8))
    teacher = Moving()
    with serving_teachers(hosted("smol", teacher, keep), cache=keep.cache) as url:
        facts, _ = asyncio.run(check_service(url))
        assert asyncio.run(check_cached(url, "smol", facts, PROBING)).level == "ok"
        teacher.moved = True
        verdict = asyncio.run(check_cached(url, "smol", facts, PROBING))
        assert verdict.level == "fail"
        assert "kept and live differ by" in verdict.detail
    empty = ServiceFacts((), {})
    assert asyncio.run(check_cached("http://127.0.0.1:9", "smol", empty, PROBING)).level == "not run"


def test_a_wrong_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--teacher", "smol") == 1
    assert "write NAME=MODEL" in capsys.readouterr().err
    assert run("doctor", "--rounds", 1) == 1
    assert "rounds" in capsys.readouterr().err
