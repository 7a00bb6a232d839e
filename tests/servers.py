"""A real service on a loopback port, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn

from cache.types import Teacher
from teacher_service.app import create_app
from teacher_service.connections import bounded_protocol
from teacher_service.hosted import HostedTeacher, Keep
from teacher_service.service import Service
from teacher_service.settings import LimitSettings


@contextmanager
def serving(app: Any, *, port: int = 0, limits: LimitSettings | None = None) -> Iterator[str]:
    """Run an ASGI app on a loopback port, by default a free one, in a thread; yields its URL."""
    listener = socket.create_server(("127.0.0.1", port))
    protocol = bounded_protocol(limits or LimitSettings())
    config = uvicorn.Config(app, http=protocol, log_config=None, ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
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
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def serving_teachers(*teachers: HostedTeacher, **options: Any) -> Iterator[str]:
    """Run a service on these teachers until they are up; yields its URL."""
    with serving(create_app(Service.of(teachers, **options)), limits=options.get("limits")) as url:
        wait_ready(url)
        yield url
