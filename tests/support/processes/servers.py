"""A real service on a loopback port, in a thread of the test's process."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import httpx

from potstill.cache import Cache
from potstill.cache.types import Teacher
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LimitSettings
from potstill.teacher_service.transport import BoundedListener, BoundedServer
from tests.support import http
from tests.support.fakes import FakeTeacher


@contextmanager
def serving(app: Any, *, port: int = 0, limits: LimitSettings | None = None, **options: Any) -> Iterator[str]:
    """Run an ASGI app on a loopback port, by default a free one, in a thread; yields its URL."""
    limits, tls = limits or LimitSettings(), "ssl_certfile" in options
    listener = BoundedListener(socket.create_server(("127.0.0.1", port)), limits, tls=tls)
    # The loop of `potstill serve`; uvicorn alone would take another one where that is installed.
    server = BoundedServer(app, limits, loop="asyncio", timeout_graceful_shutdown=2, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def opens(teacher: Teacher) -> Callable[[], AbstractAsyncContextManager[Teacher]]:
    @asynccontextmanager
    async def open_it() -> AsyncIterator[Teacher]:
        yield teacher

    return open_it


def hosted(name: str, teacher: Teacher, keep: Keep | None = None) -> HostedTeacher:
    return HostedTeacher(name, opens(teacher), keep)


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 300
    while http.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def serving_teachers(*teachers: HostedTeacher, **options: Any) -> Iterator[str]:
    """Run a service on these teachers until they are up; yields its URL."""
    with serving(create_app(Service(teachers, **options)), limits=options.get("limits")) as url:
        wait_ready(url)
        yield url


@contextmanager
def serving_corpora(cache: Cache | None) -> Iterator[str]:
    """A service of a cache's corpora, with bounds that small corpora reach; its one teacher is not theirs."""
    limits = LimitSettings(max_range_positions=50, max_stream_positions=1200, max_rows=20)
    with serving_teachers(hosted("other", FakeTeacher()), cache=cache, limits=limits) as url:
        yield url


def targets_of(url: str, **params: Any) -> httpx.Response:
    """Ask for targets of the teacher `fake` on the corpus `docs`."""
    return http.get(f"{url}/v1/corpora/docs/targets/fake", params=params)


def post_json(url: str, value: Any, *, name: str = "smol", **headers: str) -> httpx.Response:
    """Ask a teacher to score, in JSON."""
    return http.post(f"{url}/v1/teachers/{name}/score", json=value, headers=headers)


@contextmanager
def asked_by_hand(url: str, value: Any, *, name: str = "smol") -> Iterator[None]:
    """Ask a teacher to score, in JSON, and leave at the end of the block without the answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps(value).encode()
    head = f"POST /v1/teachers/{name}/score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=http.SECONDS) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        yield


def refused(reply: httpx.Response, status: int, kind: str) -> str:
    """Check the one error shape; returns the detail."""
    assert reply.status_code == status, reply.text[:500]
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"kind", "detail"}
    assert body["kind"] == kind
    assert "\n" not in body["detail"]
    return str(body["detail"])
