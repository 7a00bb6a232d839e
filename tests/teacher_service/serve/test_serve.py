from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache import Fields
from potstill.cache.errors import InvalidInput
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.teacher_service.serve import bind
from tests.support import http
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher, GatedTeacher
from tests.support.filled_caches import commit
from tests.support.processes.serve_process import Serving, refused, serve
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.scored_rows import assert_scored, rows_of
from tests.support.waiting import until

WANT = Fields(k=4)


@pytest.fixture
def behind() -> FakeTeacher:
    return FakeTeacher()


@pytest.fixture
def behind_url(behind: FakeTeacher) -> Iterator[str]:
    """The served process has this service as its teacher, so that no engine is needed."""
    with serving_teachers(hosted("deep", behind)) as url:
        yield url


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_stops_when_told(behind_url: str, number: int) -> None:
    serving = Serving("--teacher", f"smol={behind_url}#deep")
    assert serving.ready == f"ready: {serving.url} teachers smol ({behind_url}#deep)\n"
    assert http.get(f"{serving.url}/readyz").status_code == 200
    with SyncHttpTeacher(serving.url, "smol") as teacher:
        assert_scored(rows_of(5, 2), teacher.score(rows_of(5, 2), WANT))
    assert serving.stop(number) == (0, "")


def test_the_cache_keeps_rows_over_a_restart(behind_url: str, behind: FakeTeacher, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    root = tmp_path / "cache"
    config.write_text(f'cache = "{root}"\n[[teachers]]\nname = "smol"\nmodel = "{behind_url}"\n')
    answers = []
    for _ in range(2):
        serving = Serving(str(config))
        with SyncHttpTeacher(serving.url, "smol") as teacher:
            answers.append(teacher.score(rows_of(5, 2), WANT))
        assert http.get(f"{serving.url}/v1/corpora").json()["corpora"] == []
        assert serving.stop() == (0, "")
    assert len(behind.scored) == 2
    for before, after in zip(*answers, strict=True):
        assert before.ids.tolist() == after.ids.tolist()
        assert before.logprobs.tolist() == after.logprobs.tolist()


def test_targets_of_a_model_whose_folder_was_renamed_answer(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "cache")
    before = teacher_for(corpus)
    commit(plan_targets(cache, before), before, [0])
    now = FakeTeacher(replace(before.identity, model="renamed"))
    with serving_teachers(hosted("renamed", now)) as url:
        serving = Serving("--cache", str(tmp_path / "cache"), "--teacher", f"fake={url}#renamed")
        with SyncHttpTeacher(serving.url, "fake") as teacher:
            assert teacher.identity.model == "renamed"
            teacher.score([corpus.row(0)], WANT)
            assert now.scored == []
            teacher.score([corpus.row(len(corpus) - 1)], WANT)
            assert len(now.scored) == 1
        assert serving.stop() == (0, "")


def test_a_connection_that_never_becomes_a_request_is_closed(behind_url: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f'[limits]\nbody_seconds = 0.5\n[[teachers]]\nname = "smol"\nmodel = "{behind_url}"\n')
    serving = Serving(str(config))
    host, _, port = serving.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx-a: ")
        assert connection.recv(100) == b""
    assert serving.stop() == (0, "")


def test_what_is_in_flight_is_finished_before_it_stops() -> None:
    gated = GatedTeacher()
    with serving_teachers(hosted("deep", gated)) as behind_url:
        serving = Serving("--teacher", f"smol={behind_url}")
        got: list[Any] = []

        def ask() -> None:
            with SyncHttpTeacher(serving.url, "smol") as teacher:
                got.extend(teacher.score(rows_of(3), WANT))

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: gated.waiting == 1)
        serving.process.send_signal(signal.SIGTERM)
        until(lambda: refuses_connections(serving.url))
        assert serving.process.returncode is None
        gated.gate.set()
        asking.join(timeout=300)
        assert_scored(rows_of(3), got)
        assert serving.finish() == (0, "")


def test_the_grace_time_ends(tmp_path: Path) -> None:
    gated = GatedTeacher()
    with serving_teachers(hosted("deep", gated)) as behind_url:
        config = tmp_path / "serve.toml"
        config.write_text("grace_seconds = 1\n")
        serving = Serving(str(config), "--teacher", f"smol={behind_url}")
        address = f"{serving.url}/v1/teachers/smol/score"
        asking = threading.Thread(target=lambda: _ignore_errors(address))
        asking.start()
        until(lambda: gated.waiting == 1)
        begin = time.monotonic()
        status, _ = serving.stop()
        assert status == 0
        assert 0.9 < time.monotonic() - begin < 50
        asking.join(timeout=300)
        until(lambda: gated.cancelled == 1)


def refuses_connections(url: str) -> bool:
    try:
        http.get(f"{url}/healthz")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it was about to close
        return False
    return False


def _ignore_errors(address: str) -> None:
    try:
        http.post(address, json={"rows": [[1]]})
    except httpx.TransportError:
        return


def test_a_port_in_use_is_named_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("--teacher", "smol=m", "--port", str(port))
    assert line.startswith(f"invalid_input: port {port} on 127.0.0.1 is in use")
    assert "--port" in line


def test_other_hosts_are_refused_without_keys() -> None:
    line = refused("--teacher", "smol=m", "--host", "0.0.0.0")
    assert line == "invalid_input: host '0.0.0.0' is open to others; without API keys it binds to loopback only\n"
    assert "loopback only" in refused("--teacher", "smol=m", POTSTILL_HOST="0.0.0.0")
    with pytest.raises(InvalidInput, match="no address"):
        bind("no-such-host.invalid", 0)
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        bind(host, 0).close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no teacher to serve"),
        (["--teacher", "smol"], "NAME=MODEL"),
        (["--teacher", "a=m", "--teacher", "a=n"], "two teachers are called 'a'"),
        (["--teacher", "a b=m"], "teachers.0.name is 'a b'"),
        (["--teacher", "a=m", "--port", "70000"], "port is 70000"),
        (["nowhere.toml"], "there is no file 'nowhere.toml'"),
        (["--port", "0", "--teacher", "a=gopher://x"], "teacher 'a' did not start"),
        (["--port", "0", "--teacher", "a=http://x#a#b c"], "teacher 'a' did not start"),
    ],
)
def test_bad_settings_are_one_line(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_an_unknown_variable_is_refused() -> None:
    assert "unknown environment variable POTSTILL_PROT" in refused("--teacher", "a=m", POTSTILL_PROT="1")


def test_the_only_teacher_that_does_not_start_ends_the_process_with_one_line(behind_url: str) -> None:
    line = refused("--port", "0", "--teacher", f"bad={behind_url}#nobody")
    assert line == "unknown_teacher: teacher 'bad' did not start: there is no teacher 'nobody'; known are deep\n"


def test_a_teacher_that_does_not_start_is_told_and_the_others_serve(behind_url: str) -> None:
    serving = Serving("--teacher", f"bad={behind_url}#nobody", "--teacher", f"good={behind_url}#deep")
    assert serving.ready == f"ready: {serving.url} teachers good ({behind_url}#deep)\n"
    with SyncHttpTeacher(serving.url, "good") as teacher:
        assert_scored(rows_of(5, 2), teacher.score(rows_of(5, 2), WANT))
    status, errors = serving.stop()
    assert status == 0
    (line,) = errors.splitlines()
    assert line.endswith("unknown_teacher: teacher 'bad' did not start: there is no teacher 'nobody'; known are deep")


def test_it_stops_while_a_teacher_still_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        process = serve("--port", "0", "--teacher", f"a=http://127.0.0.1:{port}#x")
        silent.settimeout(300)
        connection, _ = silent.accept()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        with process:
            stdout, stderr = process.communicate(timeout=300)
        connection.close()
    assert (process.returncode, stdout, stderr) == (0, "", "")


@pytest.mark.slow
def test_replicas_run_on_a_ray_of_its_own_and_end_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f"""
        [ray]
        address = "local"

        [[teachers]]
        name = "tiny"
        model = "{tiny_llama}"
        options = {{ dtype = "float32" }}
        resources = {{ cpus = 0.5 }}
        """)
    serving = Serving(str(config))
    address = f"{serving.url}/v1/teachers/tiny"
    try:
        assert http.put(f"{address}/replicas", json={"replicas": 2}).json()["target"] == 2
        deadline = time.monotonic() + 240
        while (status := http.get(f"{address}/replicas").json())["replicas"] < 2:
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
        asked = {"rows": [[1, 2, 3], [4, 5]], "fields": {"k": 3}}
        for _ in range(4):
            assert http.post(f"{address}/score", json=asked).status_code == 200
        scored = [one["tokens_scored"] for one in http.get(f"{address}/replicas").json()["each"]]
        assert sum(scored) == 20
    finally:
        status, stderr = serving.stop()
    assert status == 0
    assert [line for line in stderr.splitlines() if "potstill.audit" not in line] == []
