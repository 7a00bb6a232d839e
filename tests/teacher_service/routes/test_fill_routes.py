from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.errors import Overloaded, TeacherFailed
from potstill.cache.types import Tokens
from potstill.teacher_service.hosting.fill_jobs import spread
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.contracts import TargetSetContract
from tests.support.corpora import make_corpus, plan_targets, teacher_for, topics
from tests.support.fakes import FakeTeacher, MoodyTeacher, fake_identity
from tests.support.fill_requests import BODY, FIELDS, run_fill, until_state
from tests.support.filled_caches import commit
from tests.support.processes.servers import hosted, refused, serving_teachers
from tests.support.waiting import until


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_corpus(tmp_path / "cache", texts=topics(3, characters=500), shard_positions=300)[0]


@pytest.fixture
def teacher(cache: Cache) -> MoodyTeacher:
    return MoodyTeacher(teacher_for(cache.corpus("docs")))


@contextmanager
def served(cache: Cache | None, **teachers: FakeTeacher) -> Iterator[str]:
    with serving_teachers(*(hosted(name, teacher) for name, teacher in teachers.items()), cache=cache) as url:
        yield f"{url}/v1/corpora/docs/fill"


def test_a_corpus_is_filled_as_prefill_fills_it(cache: Cache, teacher: MoodyTeacher, tmp_path: Path) -> None:
    corpus = cache.corpus("docs")
    with served(cache, fake=teacher) as address:
        assert "PUT" in refused(http.get(f"{address}/fake"), 404, "not_found")
        begun = http.put(f"{address}/fake", json=BODY).json()
        assert (begun["format"], begun["state"], begun["shards"]) == ("1", "running", corpus.num_shards)
        done = until_state(f"{address}/fake", "done", "failed")
    assert done["error"] is None
    assert done["state"] == "done"
    assert done["shards_committed"] == corpus.num_shards
    assert done["positions_scored"] == corpus.num_positions
    assert done["positions_per_second"] > 0
    mine = cache.fresh().targets("fake", "docs")
    assert mine.committed.all()
    other, same = make_corpus(tmp_path / "other", texts=topics(3, characters=500), shard_positions=300)
    planned = plan_targets(other, teacher_for(same), fields=FIELDS)
    planned.make_ranks(Targets.concat([teacher.targets(same.row(row), FIELDS) for row in planned.pilot_rows()]))
    commit(planned, teacher_for(same), range(same.num_shards))
    theirs = other.targets("fake", "docs")
    TargetSetContract().assert_same(mine.read(0, corpus.num_positions), theirs.read(0, corpus.num_positions))


def test_a_job_is_stopped_and_goes_on_later(cache: Cache, teacher: MoodyTeacher) -> None:
    with served(cache, fake=teacher) as address:
        http.put(f"{address}/fake", json=BODY)
        until(lambda: any(cache.fresh().targets("fake", "docs").committed if cache.teachers("docs") else ()))
        teacher.gate.clear()
        stopped = http.delete(f"{address}/fake").json()
        assert stopped["state"] in ("stopped", "done")
        assert http.delete(f"{address}/fake").json()["state"] == stopped["state"]
        calls = teacher.calls
        time.sleep(0.2)
        assert teacher.calls == calls
        teacher.gate.set()
        before = int(cache.fresh().targets("fake", "docs").committed.sum())
        http.put(f"{address}/fake", json=BODY)
        done = until_state(f"{address}/fake", "done", "failed")
        assert (done["state"], done["shards_before"]) == ("done", before)
        assert done["shards_before"] + done["shards_committed"] == done["shards"]
    assert cache.fresh().targets("fake", "docs").committed.all()


def test_there_is_one_job_of_a_corpus_and_a_teacher(cache: Cache, teacher: MoodyTeacher) -> None:
    teacher.gate.clear()
    with served(cache, fake=teacher) as address:
        first = http.put(f"{address}/fake", json=BODY).json()
        again = http.put(f"{address}/fake", json=BODY).json()
        assert (first["state"], again["state"]) == ("running", "running")
        assert again["seconds"] >= first["seconds"]
        other = http.put(f"{address}/fake", json={"fields": {"k": 5}})
        assert "DELETE" in refused(other, 409, "already_exists")
        fills = http.get(f"{address.removesuffix('/v1/corpora/docs/fill')}/v1/fills").json()
        assert [job["teacher"] for job in fills["fills"]] == ["fake"]


def test_a_running_job_ends_with_the_service(cache: Cache, teacher: MoodyTeacher) -> None:
    teacher.gate.clear()
    with served(cache, fake=teacher) as address:
        http.put(f"{address}/fake", json=BODY)
        until(lambda: teacher.calls > 0)
    calls = teacher.calls
    teacher.gate.set()
    time.sleep(0.2)
    assert teacher.calls == calls
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("claims")]


def test_a_busy_teacher_is_asked_again_and_a_broken_one_ends_the_job(cache: Cache) -> None:
    inner = teacher_for(cache.corpus("docs"))
    busy = MoodyTeacher(inner, [Overloaded("busy", retry_after=0.01), Overloaded("busy", retry_after=0.01)])
    broken = MoodyTeacher(inner, [TeacherFailed("the engine answered NaN")])
    with served(cache, busy=busy, broken=broken) as address:
        for name in ("busy", "broken"):
            http.put(f"{address}/{name}", json=BODY)
        done = until_state(f"{address}/busy", "done", "failed")
        assert (done["state"], done["refusals"]) == ("done", 2)
        failed = until_state(f"{address}/broken", "done", "failed")
        assert failed["state"] == "failed"
        assert failed["error"] == {"kind": "teacher_failed", "detail": "the engine answered NaN"}
        http.put(f"{address}/broken", json=BODY)
        assert until_state(f"{address}/broken", "done", "failed")["state"] == "done"


def test_what_cannot_be_filled_is_refused_before_anything_is_written(cache: Cache) -> None:
    corpus = cache.corpus("docs")
    teachers = {"fake": teacher_for(corpus), "stranger": FakeTeacher(fake_identity(vocab_size=256))}
    with served(cache, **teachers) as address:
        refused(http.put(f"{address}/nobody", json=BODY), 404, "unknown_teacher")
        refused(http.put(f"{address.replace('docs', 'other')}/fake", json=BODY), 404, "unknown_corpus")
        refused(http.put(f"{address}/stranger", json=BODY), 409, "spec_mismatch")
        refused(http.put(f"{address}/fake", json={"fields": {"k": 257}}), 422, "limit_exceeded")
        bodies: list[Any] = [{"fields": {"q": 1}}, {"encoding": "f8"}, {"batch_tokens": 0}, {"more": 1}, []]
        for body in bodies:
            refused(http.put(f"{address}/fake", json=body), 422, "invalid_input")
    assert cache.fresh().teachers("docs") == []
    with served(None, **teachers) as address:
        assert "--cache" in refused(http.put(f"{address}/fake", json=BODY), 422, "invalid_input")


def test_a_body_of_another_wire_version_is_refused_naming_both(cache: Cache, teacher: MoodyTeacher) -> None:
    with served(cache, fake=teacher) as address:
        for more in ({}, {"fields": [], "more": 1}):
            reply = http.put(f"{address}/fake", json={**BODY, "format": "2", **more})
            detail = refused(reply, 400, "wire_version")
            assert "'2'" in detail
            assert "'1'" in detail
        refused(http.put(f"{address}/fake", json={**BODY, "format": 2}), 422, "invalid_input")
        assert http.put(f"{address}/fake", json={**BODY, "format": "1"}).status_code == 200


class WeighingTeacher(FakeTeacher):
    """Notes how many tokens it was asked for in one call, and in all that run at one time."""

    def __init__(self, inner: FakeTeacher) -> None:
        super().__init__(inner.identity)
        self.most = self.most_together = self.together = 0

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        tokens = sum(map(len, rows))
        self.together += tokens
        self.most, self.most_together = max(self.most, tokens), max(self.most_together, self.together)
        await asyncio.sleep(0.01)
        self.together -= tokens
        return await super().score(rows, want)


def test_batches_are_cut_to_the_bounds_of_answers(cache: Cache) -> None:
    corpus = cache.corpus("docs")
    teacher = WeighingTeacher(teacher_for(corpus))
    fields = Fields(k=4, dense=True)
    size, longest = fields.bytes_per_position(teacher.identity.vocab_size), corpus.spec.longest_row
    limits = LimitSettings(max_answer_bytes=2 * longest * size, max_answer_bytes_in_flight=7 * longest * size)
    wanted = {"fields": fields.to_json(), "encoding": "f32", "batch_tokens": 100_000, "in_flight": 64}
    with serving_teachers(hosted("fake", teacher), cache=cache, limits=limits) as url:
        address = f"{url}/v1/corpora/docs/fill/fake"
        begun = http.put(address, json=wanted).json()
        assert (begun["batch_tokens"], begun["in_flight"]) == (2 * longest, 3)
        assert until_state(address, "done", "failed")["state"] == "done"
        assert http.put(address, json=wanted).json()["batch_tokens"] == 2 * longest
    assert 0 < teacher.most <= 2 * longest
    assert 0 < teacher.most_together <= 7 * longest


def test_a_row_whose_targets_do_not_fit_is_refused_and_nothing_written(cache: Cache) -> None:
    corpus = cache.corpus("docs")
    teacher = teacher_for(corpus)
    fields = Fields(k=4, dense=True)
    held = corpus.spec.longest_row * fields.bytes_per_position(teacher.identity.vocab_size)
    for name in ("max_answer_bytes", "max_answer_bytes_in_flight"):
        limits = LimitSettings(**{name: held - 1})
        with serving_teachers(hosted("fake", teacher), cache=cache, limits=limits) as url:
            wanted = {"fields": fields.to_json(), "encoding": "f32"}
            reply = http.put(f"{url}/v1/corpora/docs/fill/fake", json=wanted)
            detail = refused(reply, 422, "limit_exceeded")
            assert f"{held} bytes" in detail
            assert f"{name}={held - 1}" in detail
            assert "--row-tokens" in detail
    assert cache.fresh().teachers("docs") == []


def test_a_row_over_what_may_be_in_flight_is_refused_and_nothing_written(cache: Cache) -> None:
    corpus = cache.corpus("docs")
    longest = corpus.spec.longest_row
    for most, status in ((longest - 1, 422), (longest, 200)):
        limits = LimitSettings(max_tokens_in_flight=most)
        with serving_teachers(hosted("fake", teacher_for(corpus)), cache=cache, limits=limits) as url:
            reply = http.put(f"{url}/v1/corpora/docs/fill/fake", json=BODY)
            assert reply.status_code == status
            if status == 200:
                assert until_state(f"{url}/v1/corpora/docs/fill/fake", "done", "failed")["state"] == "done"
                continue
            detail = refused(reply, 422, "limit_exceeded")
            assert f"a row of {longest} tokens, over max_tokens_in_flight={most}" in detail
            assert f"--row-tokens {most}" in detail
            assert cache.fresh().teachers("docs") == []


def test_batches_that_are_turned_away_together_spread_out() -> None:
    waits = [spread(3.0) for _ in range(200)]
    assert 3.0 <= min(waits) < 3.5
    assert 5.5 < max(waits) <= 6.0


def test_the_command_starts_watches_and_sums_up(
    cache: Cache, teacher: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(cache, fake=teacher) as address:
        url = address.removesuffix("/v1/corpora/docs/fill")
        assert run_fill(url, "--top-k", "4", "--entropy") == 0
        shards = cache.corpus("docs").num_shards
        assert f"fake on docs: done, {shards} of {shards} shards committed (0 before)" in capsys.readouterr().out
        assert run_fill(url, "--top-k", "4", "--entropy", "--json") == 0
        assert json.loads(capsys.readouterr().out)["shards_before"] == shards
        assert run_fill(url, "--stop") == 0
        assert "done" in capsys.readouterr().out
    assert cache.fresh().targets("fake", "docs").fields == Fields(k=4, entropy=True)


def test_the_command_leaves_a_job_behind_and_stops_it(
    cache: Cache, teacher: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.gate.clear()
    with served(cache, fake=teacher) as address:
        url = address.removesuffix("/v1/corpora/docs/fill")
        assert run_fill(url, "--top-k", "4", "--no-watch") == 0
        assert "running" in capsys.readouterr().out
        assert run_fill(url, "--stop") == 0
        assert "stopped" in capsys.readouterr().out
        teacher.gate.set()
        teacher.errors.append(TeacherFailed("the engine answered NaN"))
        assert run_fill(url, "--top-k", "4") == 1
        assert "teacher_failed: the engine answered NaN" in capsys.readouterr().out
