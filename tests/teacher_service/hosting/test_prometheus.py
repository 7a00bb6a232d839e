"""A real Prometheus scrapes a real service, with the alerts that we ship."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.paths import ROOT
from tests.support.pools import hosted_pool
from tests.support.processes.servers import post_json, serving_teachers

ALERTS = ROOT / "deploy" / "prometheus-alerts.yml"


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Run one that scrapes `target` each second; yields its URL."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no prometheus on this machine; Debian's package is called prometheus")
    config = folder / "prometheus.yml"
    job = f"[{{job_name: potstill, static_configs: [{{targets: ['{target}']}}]}}]"
    every = "{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}"
    config.write_text(f"global: {every}\nrule_files: [{ALERTS}]\nscrape_configs: {job}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, *arguments], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=300)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    """The result of a query, asked until there is one."""
    deadline = time.monotonic() + 300
    while True:
        try:
            reply = http.get(f"{url}/api/v1/query", params={"query": query})
            # It answers 503 until it has read its own files.
            found: list[dict[str, Any]] = reply.json()["data"]["result"] if reply.is_success else []
        except httpx.TransportError:
            found = []
        if found:
            return found
        assert time.monotonic() < deadline, query
        time.sleep(0.1)


def test_a_prometheus_scrapes_the_service(tmp_path: Path) -> None:
    with serving_teachers(hosted_pool("big", FakeTeacher(), replicas=2)) as url:
        post_json(url, {"rows": [[1, 2, 3]] * 10, "fields": {"k": 2}}, name="big")
        with prometheus(tmp_path, url.removeprefix("http://")) as server:
            (up,) = ask(server, 'up{job="potstill"} == 1')
            assert up["value"][1] == "1"
            (tokens,) = ask(server, 'potstill_scored_tokens_total{teacher="big"}')
            assert tokens["value"][1] == "30"
            assert len(ask(server, "potstill_replica_scored_tokens_total")) == 2
            (state,) = ask(server, 'potstill_teacher_state{state="ready"}')
            assert state["value"][1] == "1"
            ask(server, "histogram_quantile(0.9, sum by (le) (potstill_score_seconds_bucket)) > 0")
            targets = http.get(f"{server}/api/v1/targets").json()["data"]["activeTargets"]
            assert [target["lastError"] for target in targets] == [""]
            rules = http.get(f"{server}/api/v1/rules").json()["data"]["groups"][0]["rules"]
            assert [(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")] == []
            assert "PotstillDown" in {rule["name"] for rule in rules}
