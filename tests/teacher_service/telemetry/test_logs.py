from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Teacher
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LogSettings, load_settings
from potstill.teacher_service.telemetry import logs
from tests.support import http
from tests.support.fakes import BrokenTeacher, FakeTeacher
from tests.support.processes.serve_process import Serving, environment, serve
from tests.support.processes.servers import hosted, post_json, serving, serving_teachers
from tests.support.waiting import until

ACCESS = "potstill.teacher_service.access"
VLLM_VARIABLES = ("VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING")
CONFIGURE = (
    "import gc, sys, threading, warnings\n"
    "from potstill.teacher_service.telemetry import logs\n"
    "from potstill.teacher_service.settings.service import LogSettings\n"
    "logs.configure(LogSettings(format='json'), sys.stderr)\n"
)


@pytest.fixture
def access(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """The fields of the access lines as they come."""
    lines: list[dict[str, Any]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append({**record.fields, "request_id": logs.request_id.get()})  # type: ignore[attr-defined]

    handler = Collect()
    with caplog.at_level(logging.INFO, logger=ACCESS):
        logging.getLogger(ACCESS).addHandler(handler)
        yield lines
        logging.getLogger(ACCESS).removeHandler(handler)


@asynccontextmanager
async def never_up() -> AsyncIterator[Teacher]:
    await asyncio.Event().wait()
    yield FakeTeacher()


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`logs.configure`, taken back at the end."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for name in VLLM_VARIABLES:
        monkeypatch.setenv(name, "")  # what is set without a value before is not taken back at the end
        monkeypatch.delenv(name)
    root = logging.getLogger()
    before, level, httpx_level = root.handlers[:], root.level, logging.getLogger("httpx").level
    yield logs.configure
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(httpx_level)
    logging.captureWarnings(capture=False)


def test_json_lines_are_one_object_each(configured: Any) -> None:
    stream = io.StringIO()
    # pytest's own handlers stay out of it: `force` would close them.
    logging.getLogger().handlers[:] = []
    configured(LogSettings(format="json", level="info"), stream)
    within = logs.request_id.set("abc")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("x").exception("it %s\n\x1b[31m", "failed")
    logs.request_id.reset(within)
    logging.getLogger("x").info("told", extra={"fields": {"rows": 3}})
    logging.getLogger("x").debug("not told")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["level"], first["logger"], first["request_id"]) == ("error", "x", "abc")
    assert first["message"] == "it failed\n\x1b[31m"
    assert "ValueError: two" in first["exception"]
    assert (second["message"], second["rows"], "request_id" in second) == ("told", 3, False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", second["time"])


def test_text_lines_show_control_characters_instead_of_obeying_them() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "GET /a\nb\x1b[31m", (), None)
    record.fields = {"status": 404, "caller": ""}
    line = logs.TextLines().format(record)
    assert line.endswith(r"WARNING x: GET /a\x0ab\x1b[31m status=404")


@pytest.mark.parametrize("given", ["a", "x" * 64, "4bf92f35-77b3.4da6_a3ce"])
def test_a_request_keeps_a_good_id(given: str) -> None:
    assert logs.choose_request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "x" * 65, "a b", "a\n", "ä", '"', "a;b"])
def test_a_bad_id_is_replaced_by_a_fresh_one(given: str | None) -> None:
    chosen = {logs.choose_request_id(given) for _ in range(50)}
    assert len(chosen) == 50
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in chosen)


def test_every_answer_carries_its_id_also_errors_and_bugs() -> None:
    teachers = (hosted("smol", FakeTeacher()), hosted("bug", BrokenTeacher(RuntimeError("inside"))))
    with serving_teachers(*teachers) as url:
        for path, status in (("/healthz", 200), ("/nowhere", 404), ("/v1/teachers/nobody", 404), ("/", 200)):
            reply = http.get(f"{url}{path}", headers={"x-request-id": "mine-1"})
            assert (reply.status_code, reply.headers["x-request-id"]) == (status, "mine-1")
        assert len(http.get(f"{url}/healthz").headers["x-request-id"]) == 16
        reply = post_json(url, {"rows": [[1]]}, name="bug", **{"x-request-id": "mine-2"})
        assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine-2")
        assert 'route="/v1/teachers/{name}/score",status="500"' in http.get(f"{url}/metrics").text


def test_a_request_leaves_one_line(access: list[dict[str, Any]]) -> None:
    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        access.clear()
        post_json(url, {"rows": [[1, 2, 3], [4]]}, **{"x-request-id": "mine"})
        http.request("PROPFIND", f"{url}/secret-path")
        until(lambda: len(access) == 2)
    scored, unusual = access
    assert scored.pop("ms") > 0
    assert scored == {
        "method": "POST",
        "route": "/v1/teachers/{name}/score",
        "status": 200,
        "rows": 2,
        "tokens": 4,
        "caller": "",
        "request_id": "mine",
    }
    assert (unusual["method"], unusual["route"], unusual["status"]) == ("other", "unmatched", 404)


def test_requests_at_the_same_time_keep_their_ids_apart(access: list[dict[str, Any]]) -> None:
    async def ask(url: str) -> None:
        async with httpx.AsyncClient(timeout=http.SECONDS, verify=http.TRUSTED) as client:
            posts = (
                client.post(
                    f"{url}/v1/teachers/smol/score",
                    json={"rows": [[1] * (i + 1)]},
                    headers={"x-request-id": f"r{i}"},
                )
                for i in range(20)
            )
            await asyncio.gather(*posts)

    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        access.clear()
        asyncio.run(ask(url))
    assert {line["request_id"]: line["tokens"] for line in access} == {f"r{i}": i + 1 for i in range(20)}


def test_a_failure_inside_is_logged_under_the_id_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    ids: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                ids.append(json.loads(logs.JsonLines().format(record))["request_id"])

    handler = Collect()
    logging.getLogger().addHandler(handler)
    with serving_teachers(hosted("bug", BrokenTeacher(RuntimeError("inside")))) as url:
        post_json(url, {"rows": [[1]]}, name="bug", **{"x-request-id": "mine"})
        until(lambda: bool(ids))
    logging.getLogger().removeHandler(handler)
    assert set(ids) == {"mine"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[logs]\nformat = "xml"', ["logs.format is 'xml'", "'text' or 'json'"]),
        ('[logs]\nlevel = "loud"', ["logs.level is 'loud'"]),
        ("[logs]\ncolour = true", ["logs.colour", "known are format, level"]),
        (
            '[tracing]\nendpoint = "collector:4318"',
            ["tracing.endpoint is 'collector:4318'", "http://collector:4318/v1/traces"],
        ),
    ],
)
def test_bad_settings_are_one_line_that_names_them(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        load_settings(tmp_path / "serve.toml", command_line={"teachers": [{"name": "a", "model": "m"}]}, environment={})
    assert all(word in caught.value.detail for word in words), caught.value.detail


def test_a_served_process_writes_json_only(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('[logs]\nformat = "json"\nlevel = "info"\n')
    with serving_teachers(hosted("deep", FakeTeacher())) as behind:
        served = Serving(str(config), "--teacher", f"smol={behind}#deep")
        http.get(f"{served.url}/healthz")
        http.get(f"{served.url}/v1/teachers", headers={"x-request-id": "mine"})
        served.process.send_signal(signal.SIGTERM)
        with served.process:
            stdout, stderr = served.process.communicate(timeout=300)
    assert (served.process.returncode, stdout) == (0, "")
    ready = json.loads(served.ready)
    assert ready["message"] == f"ready: {served.url} teachers smol ({behind}#deep)"
    lines = [json.loads(line) for line in stderr.splitlines()]
    (line,) = (line for line in lines if "route" in line)
    assert (line["route"], line["request_id"], line["status"], line["level"]) == ("/v1/teachers", "mine", 200, "info")
    assert all({"time", "level", "logger", "message"} <= set(line) for line in [ready, *lines])


def test_what_ends_a_served_process_is_json_too(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('[logs]\nformat = "json"\n')
    with (
        serving_teachers(hosted("deep", FakeTeacher())) as behind,
        serve(str(config), "--port", "0", "--teacher", f"bad={behind}#nobody") as process,
    ):
        stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (1, "")
    (line,) = map(json.loads, stderr.splitlines())
    assert line["message"].startswith("unknown_teacher: teacher 'bad' did not start: ")


def lines_of(code: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of a process that logs JSON and runs this code, and its lines, which all have to be objects."""
    variables = {key: value for key, value in environment().items() if key not in VLLM_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURE + code],
        capture_output=True,
        text=True,
        timeout=300,
        env=variables,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]


def test_warnings_and_bugs_that_end_a_process_are_json_too() -> None:
    status, (warned, ended) = lines_of("warnings.warn('old', stacklevel=1)\nraise RuntimeError('two\\nlines')\n")
    assert status == 1
    assert "UserWarning: old" in warned["message"]
    assert (ended["level"], "RuntimeError: two\nlines" in ended["exception"]) == ("critical", True)


def test_what_ends_a_thread_or_fails_in_a_finalizer_is_json_too() -> None:
    status, (thread, finalizer) = lines_of(
        "class Held:\n"
        "    def __del__(self): raise ValueError('late')\n"
        "def bug(): raise RuntimeError('in a thread')\n"
        "for work in (bug, sys.exit):\n"
        "    thread = threading.Thread(target=work, name='worker')\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "Held()\n"
        "gc.collect()\n"
    )
    assert status == 0
    assert thread["message"] == "the thread 'worker' ends by a failure that nobody expected"
    assert "RuntimeError: in a thread" in thread["exception"]
    assert "__del__" in finalizer["message"]
    assert "ValueError: late" in finalizer["exception"]


@pytest.mark.slow
def test_what_vllm_logs_after_an_engine_has_set_up_its_loggers_is_json_too() -> None:
    _, lines = lines_of(
        "import vllm.logger\n"
        "from vllm.config.logging import LoggingConfig\n"
        "vllm.logger.configure_logging_if_needed(LoggingConfig())\n"  # as `LLMEngine` and an engine's own process do
        "core = vllm.logger.init_logger('vllm.v1.engine.core')\n"
        "core.warning('not told')\n"
        "core.error('EngineCore encountered a fatal error.')\n"
    )
    [line] = [line for line in lines if line["logger"] == "vllm.v1.engine.core"]
    assert (line["level"], line["message"]) == ("error", "EngineCore encountered a fatal error.")


@pytest.mark.parametrize("variable", VLLM_VARIABLES)
def test_a_logging_of_vllm_that_somebody_chose_is_left_alone(
    variable: str, configured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger().handlers[:] = []
    monkeypatch.setenv(variable, "1")
    configured(LogSettings(format="json"), io.StringIO())
    assert {name: os.environ[name] for name in VLLM_VARIABLES if name in os.environ} == {variable: "1"}


def test_text_leaves_vllm_to_itself(configured: Any) -> None:
    logging.getLogger().handlers[:] = []
    configured(LogSettings(), io.StringIO())
    assert not set(VLLM_VARIABLES) & os.environ.keys()


@pytest.mark.parametrize(("ready", "level"), [(True, "DEBUG"), (False, "INFO")])
def test_probes_that_are_answered_well_are_told_at_debug_only(
    ready: bool, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = hosted("smol", FakeTeacher()) if ready else HostedTeacher("smol", never_up)
    told: dict[str, str] = {}
    with serving(create_app(Service([teacher]))) as url:
        until(lambda: http.get(f"{url}/readyz").status_code == (200 if ready else 503))
        with caplog.at_level(logging.DEBUG, logger=ACCESS):
            caplog.clear()
            for path in ("/healthz", "/metrics", "/readyz", "/health", "/v1/teachers"):
                http.get(f"{url}{path}")
            until(lambda: "/v1/teachers" in [record.fields["route"] for record in caplog.records])  # type: ignore[attr-defined]
            told = {record.fields["route"]: record.levelname for record in caplog.records}  # type: ignore[attr-defined]
    assert told == {
        "/healthz": "DEBUG",
        "/metrics": "DEBUG",
        "/readyz": level,
        "/health": level,
        "/v1/teachers": "INFO",
    }


def test_of_what_strangers_cause_one_line_in_ten_seconds_is_written(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    logger = logging.getLogger("potstill.tests.strangers")
    logger.addFilter(logs.Seldom(lambda: now[0]))
    for second in range(25):
        now[0] = float(second)
        for _ in range(100):
            logger.warning("refused %d\nby <object at %d>", second, second)
        logger.warning("another in between")
    said = [message.partition("\n") for message in caplog.messages if message.startswith("refused")]
    assert [first for first, _, _ in said] == ["refused 0", "refused 10", "refused 20"]
    assert [rest for _, _, rest in said][1:] == ["by <object at 10> (and 999 times before)"] * 1 + [
        "by <object at 20> (and 999 times before)"
    ]


def test_no_traceback_of_the_service_is_left_out() -> None:
    seldom = logs.Seldom(lambda: 0.0)
    what = (RuntimeError, RuntimeError("a bug"), None)
    records = [
        logging.LogRecord(name, logging.ERROR, "", 0, "Exception in ASGI application", (), what)
        for name in ("uvicorn.error", "uvicorn.error", "asyncio", "asyncio")
    ]
    assert [seldom.filter(record) for record in records] == [True, True, True, False]
