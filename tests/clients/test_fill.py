"""`potstill fill`: what it tells, and how it watches a service that goes away."""

from __future__ import annotations

import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from potstill.cache import Cache
from potstill.clients.fill_watch import FillWatch
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from tests.support import http
from tests.support.command_line import refused, run
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.fakes import FakeTeacher, MoodyTeacher
from tests.support.processes.faulty_proxy import faulty_proxy, no_faults
from tests.support.processes.servers import hosted, serving, serving_teachers, wait_ready

FIELDS = ("--top-k", "4", "--entropy", "--temperatures", "2.0,4.0")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_corpus(tmp_path / "cache", texts=topics(3, characters=500), shard_positions=300)[0]


@pytest.fixture
def shut(cache: Cache) -> Iterator[MoodyTeacher]:
    """A teacher that answers when its gate is opened."""
    teacher = MoodyTeacher(teacher_for(cache.corpus("docs")))
    teacher.gate.clear()
    yield teacher
    teacher.gate.set()


@contextmanager
def served(cache: Cache, teacher: FakeTeacher, port: int = 0) -> Iterator[str]:
    with serving(create_app(Service([hosted("fake", teacher)], cache=cache)), port=port) as url:
        wait_ready(url)
        yield url


def names(url: str) -> tuple[str, ...]:
    return ("fill", "--url", url, "--corpus", "docs", "--teacher", "fake")


class Watching:
    """`potstill fill` in a thread; what it writes is captured as ever."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.status: int | None = None
        self._capsys = capsys
        self._out = self._err = ""
        self._thread = threading.Thread(target=self._run, args=arguments)
        self._thread.start()

    def _run(self, *arguments: str) -> None:
        self.status = run(*arguments)

    @property
    def err(self) -> str:
        out, err = self._capsys.readouterr()
        self._out, self._err = self._out + out, self._err + err
        return self._err

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not holds():
            assert time.monotonic() < deadline, self.err
            time.sleep(0.02)

    def finish(self) -> tuple[int | None, str, list[str]]:
        self._thread.join(timeout=300)
        assert not self._thread.is_alive()
        err = self.err.splitlines()
        return self.status, self._out, err


def test_no_watch_tells_what_runs_and_the_commands_that_watch_and_stop_it(
    cache: Cache, shut: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(cache, shut) as url:
        assert run(*names(url), *FIELDS, "--no-watch") == 0
        told, watch, stop = capsys.readouterr().out.splitlines()
        shards = cache.corpus("docs").num_shards
        assert told == f"fake on docs: running in the service; 0 of {shards} shards committed before it"
        assert watch == f"watch it: {shlex.join(['potstill', *names(url), *FIELDS])}"
        assert stop == f"stop it: {shlex.join(['potstill', *names(url), '--stop'])}"
        shut.gate.set()
        # Typed as it was told, it watches that very job to its end.
        assert run(*shlex.split(watch)[3:]) == 0
        assert f"fake on docs: done, {shards} of {shards} shards committed (0 before)" in capsys.readouterr().out
        assert run(*names(url), *FIELDS, "--no-watch") == 0
        assert f"{shards} of {shards} shards committed before it" in capsys.readouterr().out


def test_refusals_name_the_command_and_the_http_method(
    cache: Cache, shut: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(cache, shut) as url:
        none = refused(capsys, *names(url), "--stop")
        assert none.startswith("not_found: no fill of corpus 'docs' by teacher 'fake' was started since")
        assert "`potstill fill`" in none
        assert "over HTTP: PUT" in none
        assert run(*names(url), "--top-k", 4, "--no-watch") == 0
        other = refused(capsys, *names(url), "--top-k", 5)
        assert other.startswith("already_exists: ")
        assert "`potstill fill --corpus docs --teacher fake --stop` (over HTTP: DELETE)" in other


def test_a_watcher_waits_for_a_service_that_does_not_answer_for_a_while(
    cache: Cache, shut: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(cache, shut) as url, faulty_proxy(url) as proxy:
        watching = Watching(capsys, *names(proxy.endpoint), *FIELDS)
        watching.until(lambda: shut.calls > 0)
        proxy.choose = lambda _method, _target: "drop before"
        watching.until(lambda: proxy.met["drop before"] >= 5)
        shut.gate.set()
        proxy.choose = no_faults
        status, out, err = watching.finish()
    assert (status, "fake on docs: done" in out) == (0, True)
    told = [line for line in err if "tokens" not in line]
    assert len(told) == 2, err
    assert told[0].startswith("fill docs by fake: no answer for now (")
    assert told[0].endswith(
        "cannot be reached: Server disconnected without sending a response.); trying again for up to 600 s"
    )
    assert told[1] == "fill docs by fake: the service answers again"


def test_a_watcher_gives_up_after_the_stated_time_without_an_answer(
    cache: Cache, shut: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(served(cache, shut))
        watching = Watching(capsys, *names(url), "--top-k", "4", "--patience", "0.5")
        watching.until(lambda: shut.calls > 0)
        stack.close()
        status, out, err = watching.finish()
    assert (status, out) == (1, "")
    assert err[0].endswith("trying again for up to 0.5 s")
    assert err[-1].startswith(f"unavailable: no answer for 0.5 s ({url} cannot be reached")
    assert f"`potstill fill --url {url} --corpus docs --teacher fake --top-k 4` watches it" in err[-1]


def test_a_restarted_service_has_forgotten_the_job_and_the_way_on_is_told(
    cache: Cache, shut: MoodyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(served(cache, shut))
        watching = Watching(capsys, *names(url), "--top-k", "4")
        watching.until(lambda: shut.calls > 0)
        stack.close()
        watching.until(lambda: "no answer for now" in watching.err)
        stack.enter_context(served(cache, teacher_for(cache.corpus("docs")), port=urlsplit(url).port or 0))
        status, out, err = watching.finish()
        assert http.get(f"{url}/v1/fills").json()["fills"] == []
        again = f"potstill fill --url {url} --corpus docs --teacher fake --top-k 4"
        assert (status, out) == (1, "")
        assert err[-1].startswith("not_found: the service was restarted, which ended the fill")
        assert err[-1].endswith(f"What is committed stays; `{again}` goes on with the rest")
        assert run(*shlex.split(again)[1:]) == 0
    assert cache.fresh().targets("fake", "docs").committed.all()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_service_that_is_not_up_yet_is_waited_for(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    watching = Watching(capsys, *names(url), *FIELDS)
    watching.until(lambda: "no answer for now" in watching.err)
    with served(cache, teacher_for(cache.corpus("docs")), port=port):
        status, out, err = watching.finish()
    assert (status, "fake on docs: done" in out) == (0, True)
    told = [line for line in err if "tokens" not in line]
    assert told[0].startswith(f"fill docs by fake: no answer for now ({url} cannot be reached")
    assert told[1:] == ["fill docs by fake: the service answers again"]


@pytest.mark.parametrize(
    ("options", "told"), [((), "Whether it began is not known"), (("--stop",), "the same command")]
)
def test_a_service_that_does_not_come_up_is_given_up_after_the_stated_time(
    options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(*names(f"http://127.0.0.1:{free_port()}"), "--patience", "0.3", *options) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("trying again for up to 0.3 s")
    assert last.startswith("unavailable: no answer for 0.3 s (http://127.0.0.1:")
    assert told in last


def test_a_key_in_the_url_is_sent_and_printed_nowhere(
    cache: Cache, shut: MoodyTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "filler", Role.BATCH, Quota())
    with ExitStack() as stack:
        url = stack.enter_context(serving_teachers(hosted("fake", shut), cache=cache, access=Access(KeyRing(file))))
        with_key = url.replace("http://", f"http://any:{key}@")
        assert run(*names(with_key), "--no-watch") == 0
        begun = capsys.readouterr().out
        assert f"watch it: potstill fill --url {url} --corpus docs" in begun
        assert "POTSTILL_API_KEY" in begun.splitlines()[-1]
        wrong = refused(capsys, *names(url.replace("http://", "http://any:wrong@")))
        watching = Watching(capsys, *names(with_key), "--patience", "0.5")
        watching.until(lambda: shut.calls > 0)
        stack.close()
        status, out, err = watching.finish()
    assert (wrong.startswith("unauthenticated: "), status) == (True, 1)
    assert f"`potstill fill --url {url} --corpus docs" in err[-1]
    for printed in (begun, out, *err):
        assert key not in printed
    assert "wrong" not in wrong


@pytest.mark.parametrize(
    "url",
    ["http://any:SECRET@host:99999", "http://any:SECRET@host:x", "ftp://any:SECRET@host", "http://a:SECRET@h?q=1"],
)
def test_a_url_that_is_refused_is_shown_without_its_key(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (names(url), ("teachers", "list", "--url", url), ("doctor", "--url", url)):
        line = refused(capsys, *command)
        assert line.startswith("invalid_input: ")
        assert "SECRET" not in line


def test_ctrl_c_names_the_command_that_stops_the_job_without_the_key(
    cache: Cache, shut: MoodyTeacher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: FillWatch) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(FillWatch, "look", interrupted)
    with served(cache, shut) as url:
        assert run(*names(url.replace("http://", "http://any:SECRET@"))) == 130
        err = capsys.readouterr().err
    assert f"`potstill fill --url {url} --corpus docs --teacher fake --stop` ends it" in err
    assert "SECRET" not in err


def test_a_patience_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for patience in ("0", "-1", "nan", "inf"):
        line = refused(capsys, *names("http://127.0.0.1:9"), f"--patience={patience}")
        assert line.startswith("invalid_input: --patience is ")


def test_the_key_may_be_in_another_variable(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.toml"
    monkeypatch.setenv("FILLER", add_key(file, "filler", Role.BATCH, Quota()))
    teacher = hosted("fake", teacher_for(cache.corpus("docs")))
    with serving_teachers(teacher, cache=cache, access=Access(KeyRing(file))) as url:
        assert refused(capsys, *names(url)).startswith("unauthenticated: ")
        assert run(*names(url), "--api-key-env", "FILLER", "--no-watch") == 0
        assert "--api-key-env FILLER" in capsys.readouterr().out
        assert run(*names(url), "--api-key-env", "FILLER") == 0
        unset = refused(capsys, *names(url), "--api-key-env", "NOT_SET_HERE")
        assert unset.startswith("invalid_input: --api-key-env NOT_SET_HERE: there is no such")
