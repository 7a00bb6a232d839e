"""`potstill serve`: one process with teachers, the cache in front of them, and the HTTP API."""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn

from cache.errors import InvalidInput
from teacher_service.app import create_app
from teacher_service.replicas import HostedTeacher, Keep
from teacher_service.service import Service
from teacher_service.settings import ServiceSettings, load_settings, teacher_from_argument

SUMMARY = "serve teachers over HTTP, with the cache in front of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings; options win over it")
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="NAME=MODEL",
        help="serve MODEL (a model name, a path, or the URL of another service) as NAME; may be repeated",
    )
    parser.add_argument("--cache", metavar="ROOT", help="folder or URL of the cache; without it nothing is kept")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on; 0 takes a free one (default: 8700)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit status.

    Raises:
        InvalidInput: bad settings, an address that cannot be had.
        PotstillError: a teacher did not start, or could not be closed cleanly.
    """
    named = None if args.teacher is None else [teacher_from_argument(text) for text in args.teacher]
    command_line = {"host": args.host, "port": args.port, "cache": args.cache, "teachers": named}
    settings = load_settings(args.config, command_line=command_line, environment=os.environ)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    # The port first: who has to choose another one should not wait for engines.
    with bind(settings.host, settings.port) as listener:
        asyncio.run(_serve(settings, listener))
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on a loopback address.

    Raises:
        InvalidInput: an unknown or not a loopback host, or a port that is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidInput(f"host {host!r} has no address: {error.strerror}") from error
    family, _, _, _, address = found[0]
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise InvalidInput(f"host {host!r} is open to others; without API keys it binds to loopback only")
    try:
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            way_out = "stop what uses it, or choose another with --port (0 takes a free one)"
            raise InvalidInput(f"port {port} on {host} is in use; {way_out}") from error
        raise InvalidInput(f"port {port} on {host} cannot be had: {error.strerror}") from error


def service_of(settings: ServiceSettings) -> Service:
    """The service that the settings describe, with nothing started yet.

    Raises:
        PotstillError: the cache cannot be opened.
    """
    from cache.cache import Cache  # noqa: PLC0415  zarr, only when a service runs
    from cache.cached import KeepPolicy  # noqa: PLC0415
    from cache.entry_points import open_teacher  # noqa: PLC0415

    cache = None if settings.cache is None else Cache.open(settings.cache, mode="r+")
    quota_bytes = int(settings.keep.journal_quota_gib * 2**30)
    policy = KeepPolicy(k=settings.keep.k, encoding=settings.keep.encoding, quota_bytes=quota_bytes)
    keep = None if cache is None else Keep(cache, policy)
    teachers = [
        HostedTeacher(teacher.name, partial(open_teacher, teacher.model, options=teacher.options), keep)
        for teacher in settings.teachers
    ]
    return Service.of(teachers, cache=cache, limits=settings.limits)


class _Server(uvicorn.Server):
    """Stops on signals without raising them again: a service that was told to stop has succeeded."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        stopping = (signal.SIGINT, signal.SIGTERM)
        for number in stopping:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in stopping:
                loop.remove_signal_handler(number)


async def _serve(settings: ServiceSettings, listener: socket.socket) -> None:
    service = service_of(settings)
    # The teachers are run here and not by the app's lifespan, whose failures uvicorn would swallow.
    config = uvicorn.Config(
        create_app(service),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.grace_seconds,
    )
    server = _Server(config)
    async with service.running():
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        starting = asyncio.create_task(service.started())
        try:
            await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and starting.exception() is None:
                print(ready_line(settings, listener), flush=True)  # noqa: T201  what scripts wait for
                await serving
        finally:
            server.should_exit = True
            starting.cancel()
            await asyncio.wait({serving, starting})
        if not starting.cancelled():
            starting.result()
        serving.result()


def ready_line(settings: ServiceSettings, listener: socket.socket) -> str:
    """`ready: URL teachers NAME (MODEL), ...`."""
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    teachers = ", ".join(f"{teacher.name} ({teacher.model})" for teacher in settings.teachers)
    return f"ready: http://{where}:{port} teachers {teachers}"
