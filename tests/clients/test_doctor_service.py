"""`potstill doctor` of a service: what each key may see, and what is there without a teacher or a store."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from potstill.cache import Cache, Fields
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.clients.doctor.service_checks import check_service
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.hosting.hosted_teacher import Keep
from tests.support import http
from tests.support.command_line import refused, run
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import commit
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.waiting import until


def examined(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, Any]]:
    """The findings by check."""
    capsys.readouterr()
    run("doctor", *arguments, "--json")
    return {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_each_key_is_told_what_it_may_not_see_and_may_be_in_another_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.toml"
    for role in Role:
        monkeypatch.setenv(f"OF_{role.name}", add_key(file, role.value, role, Quota()))
    keep = Keep(Cache.open(tmp_path / "c", mode="r+"), KeepPolicy(k=8))
    teacher = hosted("smol", FakeTeacher(), keep)
    with serving_teachers(teacher, cache=keep.cache, access=Access(KeyRing(file))) as url:
        for name in ("TRAINER", "BATCH"):
            kept = examined(capsys, "--url", url, "--api-key-env", f"OF_{name}")["kept = live"]
            assert (kept["level"], kept["way_out"]) == ("not run", "use a key with the role admin")
            assert "this needs the role admin" in kept["detail"]
        admin = examined(capsys, "--url", url, "--api-key-env", "OF_ADMIN")
        assert (admin["kept = live"]["level"], admin["service"]["level"]) == ("ok", "ok")
        opened = examined(capsys, "--teacher", f"smol={url}#smol", "--api-key-env", "OF_TRAINER")
        assert opened["mass and order"]["level"] == "ok"
        assert examined(capsys, "--url", url)["service"]["level"] == "fail"
        assert "--api-key-env NONE" in refused(capsys, "doctor", "--url", url, "--api-key-env", "NONE")


def test_a_service_that_keeps_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        kept = examined(capsys, "--url", url)["kept = live"]
    assert (kept["level"], kept["detail"]) == ("not run", "nothing is kept of this teacher's answers")


def test_targets_of_a_model_whose_folder_was_renamed_are_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    before = teacher_for(corpus)
    commit(plan_targets(cache, before, fields=Fields(k=4)), before, range(corpus.num_shards))
    now = FakeTeacher(replace(before.identity, model="renamed"))
    with serving_teachers(hosted("fake", now)) as url:
        stored = examined(capsys, "--cache", tmp_path / "c", "--teacher", f"fake={url}#fake")["stored = live"]
    assert stored["level"] == "ok"


def test_the_doctor_answers_the_rest_when_the_store_does_not(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    commit(plan_targets(cache, teacher), teacher, [0])
    record = tmp_path / "c" / "targets" / "fake" / "docs" / "zarr.json"
    with serving_teachers(hosted("fake", teacher), cache=cache) as url:
        record.unlink()
        record.mkdir()  # a store that refuses, also to root: it is no file
        reply = http.get(f"{url}/v1/doctor")
        findings = {each.check: each for each in asyncio.run(check_service(url))[1]}
    assert reply.status_code == 200, reply.text
    told = reply.json()
    [unreadable] = told["store"]["unreadable"]
    assert (unreadable["name"], unreadable["kind"]) == ("docs", "store")
    assert unreadable["detail"].startswith("targets/fake/docs/zarr.json: ")
    assert told["memory"]["rss_bytes"] > 0
    assert findings["wire version"].level == "ok"
    assert (findings["corpus"].level, findings["corpus"].detail) == ("fail", unreadable["detail"])
    assert "the store did not give it" in findings["corpus"].way_out


def serves_nothing(url: str) -> bool:
    return bool(http.get(f"{url}/v1/teachers").json()["teachers"] == [])


def test_a_service_without_a_teacher_is_in_order_where_it_has_a_cache(tmp_path: Path) -> None:
    cache, _ = make_corpus(tmp_path / "c")
    for service_cache, level in ((cache, "warn"), (None, "fail")):
        with serving_teachers(hosted("smol", FakeTeacher()), cache=service_cache) as url:
            http.delete(f"{url}/v1/teachers/smol")
            until(partial(serves_nothing, url))
            [service] = [each for each in asyncio.run(check_service(url))[1] if each.check == "service"]
        assert (service.level, service.detail.startswith("it serves no teacher")) == (level, True)
