"""`potstill doctor` of a service: what each key may see, and targets of a model that was renamed."""

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


def test_targets_of_a_model_that_was_renamed_are_told_by_the_service_and_of_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    before = teacher_for(corpus, model="old")
    commit(plan_targets(cache, before, fields=Fields(k=4)), before, range(corpus.num_shards))
    now = FakeTeacher(replace(before.identity, model="new"))
    with serving_teachers(hosted("fake", now), hosted("other", before), cache=cache) as url:
        for arguments in (("--url", url), ("--cache", tmp_path / "c", "--teacher", f"fake={url}#fake")):
            told = examined(capsys, *arguments)["model name"]
            assert (told["level"], told["subject"]) == ("warn", "fake")
            assert "model 'new'" in told["detail"]
            assert "model 'old' (teacher 'fake', corpora docs)" in told["detail"]
            assert told["way_out"].startswith("to use them, serve the weights as 'fake' from a folder named 'old'")
        assert "model name" not in examined(capsys, "--cache", tmp_path / "c", "--teacher", f"fake={url}#other")


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
