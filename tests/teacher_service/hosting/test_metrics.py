from __future__ import annotations

import json
import re
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import which

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from potstill.cache import Cache
from potstill.cache.errors import Overloaded
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import Teacher
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.fakes import BrokenTeacher, FakeTeacher, GatedTeacher
from tests.support.paths import ROOT
from tests.support.pools import hosted_pool
from tests.support.processes.servers import hosted, post_json, serving, serving_teachers
from tests.support.waiting import until


def metrics_text(url: str) -> str:
    return http.get(f"{url}/metrics").text


def samples(url: str) -> dict[str, float]:
    """Each sample by name and labels, as `name{label=value,...}`."""
    found = {}
    for family in text_string_to_metric_families(metrics_text(url)):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    return Keep(Cache.open(tmp_path / "cache", mode="r+"), KeepPolicy(segment_seconds=0.1))


def test_replicas_and_their_tokens_are_counted(keep: Keep) -> None:
    teacher = hosted_pool("big", FakeTeacher(), keep, replicas=2, start_seconds=3)
    with serving_teachers(teacher, cache=keep.cache) as url:
        post_json(url, {"rows": [[1, 2, 3], [4, 5]], "fields": {"k": 2}}, name="big")
        post_json(url, {"rows": [[1, 2, 3], [9]], "fields": {"k": 2}}, name="big")
        http.put(f"{url}/v1/teachers/big/replicas", json={"replicas": 3})
        found = samples(url)
        until(lambda: samples(url)["potstill_replicas{state=ready,teacher=big}"] == 3)
        until(lambda: samples(url)["potstill_journal_bytes{teacher=big}"] > 0)
    assert found["potstill_replicas{state=ready,teacher=big}"] == 2
    assert found["potstill_replicas{state=starting,teacher=big}"] == 1
    assert found["potstill_replicas_target{teacher=big}"] == 3
    by_replica = [found[f"potstill_replica_scored_tokens_total{{replica=replica-{i},teacher=big}}"] for i in range(3)]
    assert by_replica == [5, 1, 0]
    assert found["potstill_replica_tokens_waiting{replica=replica-0,teacher=big}"] == 0
    assert found["potstill_cache_rows_total{result=hit,teacher=big}"] == 1
    assert found["potstill_cache_rows_total{result=miss,teacher=big}"] == 3
    assert found["potstill_scored_tokens_total{teacher=big}"] == 9
    assert found["potstill_score_seconds_count{teacher=big}"] == 2
    assert found["potstill_capture_path_info{capture_path=fake,teacher=big}"] == 1
    assert found["potstill_store_failing{teacher=big}"] == 0
    assert found["potstill_tokens_waiting{teacher=big}"] == found["potstill_tokens_in_flight{teacher=big}"] == 0
    assert found["process_resident_memory_bytes{}"] > 1e6


def test_a_teacher_is_in_one_state_and_a_failed_one_breaks_nothing() -> None:
    @asynccontextmanager
    async def failing() -> AsyncIterator[Teacher]:
        raise RuntimeError("no memory")
        yield

    with serving(create_app(Service([HostedTeacher("bad", failing), hosted("good", FakeTeacher())]))) as url:
        until(lambda: samples(url)["potstill_teacher_state{state=failed,teacher=bad}"] == 1)
        until(lambda: samples(url)["potstill_teacher_state{state=ready,teacher=good}"] == 1)
        found = {name: value for name, value in samples(url).items() if name.startswith("potstill_teacher_state")}
        assert sum(found.values()) == 2
        assert not any("teacher=bad" in name for name in samples(url) if name.startswith("potstill_replicas"))
        assert "no memory" in http.get(f"{url}/readyz").text
        (bad, _) = http.get(f"{url}/v1/overview").json()["teachers"]
        assert (bad["state"], bad["cause"], bad["replicas"]) == ("failed", "RuntimeError: no memory", None)


def test_a_store_that_fails_is_seen(keep: Keep) -> None:
    teacher = hosted("smol", FakeTeacher(), keep)
    with serving_teachers(teacher, cache=keep.cache) as url:
        assert teacher.cached is not None
        teacher.cached.store_error = "no space left"
        assert samples(url)["potstill_store_failing{teacher=smol}"] == 1


def test_a_request_whose_rows_wait_for_an_engine_is_counted_by_its_tokens_and_the_help_says_so() -> None:
    gated = GatedTeacher()
    limits = LimitSettings(max_engine_tokens=3)
    with serving_teachers(hosted("smol", gated), limits=limits) as url, ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(post_json, url, {"rows": [[1, 2, 3]], "fields": {"k": 2}}) for _ in range(2)]
        until(lambda: samples(url)["potstill_tokens_waiting{teacher=smol}"] == 3)
        found = samples(url)
        families = {family.name: family for family in text_string_to_metric_families(metrics_text(url))}
        gated.gate.set()
        assert [reply.result().status_code for reply in replies] == [200, 200]
    assert found["potstill_requests_in_flight{}"] == 0
    told = families["potstill_requests_in_flight"].documentation
    assert "until their answer is made or their rows begin to wait for an engine" in told
    assert "potstill_tokens_waiting" in told


def test_what_a_caller_makes_up_is_no_label() -> None:
    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        http.get(f"{url}/made-up-path")
        http.get(f"{url}/v1/teachers/made-up-name", headers={"x-request-id": "made-up-id"})
        http.request("PROPFIND", f"{url}/", headers={"user-agent": "made-up-agent"})
        post_json(url, {"rows": [], "made-up-key": 1})
        text = http.get(f"{url}/metrics").text
    assert "made-up" not in text
    assert "PROPFIND" not in text


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:potstill|process)_[a-z_]+", expression))


@pytest.fixture
def known(keep: Keep) -> set[str]:
    """The name of every sample that a service at work has."""
    with serving_teachers(hosted_pool("big", FakeTeacher(), keep), cache=keep.cache) as url:
        post_json(url, {"rows": [[1]], "fields": {"k": 2}}, name="big")
        return {name.partition("{")[0] for name in samples(url)}


def test_every_metric_of_the_dashboard_is_there(known: set[str]) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "potstill.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    used = {name for text in expressions + queries for name in names_in(text)}
    assert len(used) > 15
    assert used - known == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_metric_of_the_service_is_on_the_dashboard(known: set[str]) -> None:
    used = names_in((ROOT / "deploy" / "grafana" / "potstill.json").read_text())
    left_out = {"potstill_scored_rows_total", "potstill_replica_tokens_waiting"}
    parts = re.compile(r"_(created|sum|count)$")
    assert {name for name in known if name.startswith("potstill_") and not parts.search(name)} - used == left_out


def test_every_metric_of_the_alerts_is_there(known: set[str]) -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yml").read_text())
    used = {name for group in rules["groups"] for rule in group["rules"] for name in names_in(rule["expr"])}
    assert used
    assert used - known == set()


@pytest.mark.skipif(which("promtool") is None, reason="no promtool on this machine; it is in Debian's prometheus")
def test_promtool_has_nothing_to_say() -> None:
    with serving_teachers(hosted_pool("big", FakeTeacher())) as url:
        post_json(url, {"rows": [[1]], "fields": {"k": 2}}, name="big")
        text = http.get(f"{url}/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_only_answers_have_a_time() -> None:
    asked = {"rows": [[1, 2, 3]], "fields": {"k": 2}}
    busy, gated = BrokenTeacher(Overloaded("come back")), GatedTeacher()
    with serving_teachers(hosted("busy", busy), hosted("late", gated), hosted("good", FakeTeacher())) as url:
        assert post_json(url, asked, name="busy").status_code == 429
        assert post_json(url, asked, name="late", **{"potstill-timeout": "0.05"}).status_code == 504
        assert post_json(url, asked, name="good").status_code == 200
        found = samples(url)
    counts = {
        name: found.get(f"potstill_score_seconds_count{{teacher={name}}}", 0) for name in ("busy", "late", "good")
    }
    assert counts == {"busy": 0, "late": 0, "good": 1}
