"""`potstill serve`: one process with teachers, the cache in front of them, and the HTTP API."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from potstill.cache.entry_points import name_and_model
from potstill.cache.errors import InvalidInput, PotstillError
from potstill.cache.logins import without_login
from potstill.teacher_service.access import Access
from potstill.teacher_service.access.sites import is_loopback
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting import Keep, Service, TeacherSource
from potstill.teacher_service.settings import ServiceSettings, TlsSettings, load_settings
from potstill.teacher_service.telemetry import logs, tracing
from potstill.teacher_service.telemetry.tracing import OtelTracer
from potstill.teacher_service.transport import BoundedListener, BoundedServer
from potstill.teacher_service.transport.listener import allow_files

_LOG = logging.getLogger(__name__)
# Longer than clients hold an idle connection: closing first, we might do so while the next request is on its way.
_KEEP_ALIVE_SECONDS = 75
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
        InvalidInput: bad settings, or an address that cannot be bound.
        PotstillError: a teacher did not start, or did not close cleanly.
    """
    named = args.teacher and [{"name": name, "model": model} for name, model in map(name_and_model, args.teacher)]
    command_line = {"host": args.host, "port": args.port, "cache": args.cache, "teachers": named}
    settings = load_settings(args.config, command_line=command_line, environment=os.environ)
    logs.configure(settings.logs, sys.stderr)
    try:
        _run(settings)
    except PotstillError as error:
        if settings.logs.format == "text":
            raise
        # Raised, the error would become a line of plain text, which a log shipper cannot read as JSON.
        _LOG.critical("%s: %s", error.kind, error.detail)
        return 1
    return 0


def _run(settings: ServiceSettings) -> None:
    access = Access.of(settings.access)
    if settings.tls is not None:
        check_tls(settings.tls)
    allow_files(settings.limits)
    has_keys = access.keys is not None
    # The port first: who has to choose another one should not wait for engines.
    with ExitStack() as stack:
        bound = bind(settings.host, settings.port, has_keys=has_keys)
        listener = stack.enter_context(BoundedListener(bound, settings.limits, tls=settings.tls is not None))
        endpoint = settings.tracing.endpoint
        tracer = None if endpoint is None else stack.enter_context(closing(tracing.open_tracer(endpoint)))
        if settings.tls is None and not is_loopback(listener.getsockname()[0]):
            _LOG.warning("API keys and tokens travel in the clear: set [tls], or put something with TLS in front")
        asyncio.run(_serve(settings, access, listener, tracer))


def check_tls(tls: TlsSettings) -> None:
    """Check that the certificate and its key can be used; raises InvalidInput."""
    # Checked before any engine starts; uvicorn would end with a traceback, and later.
    for path in (tls.certfile, tls.keyfile):
        if not Path(path).is_file():
            raise InvalidInput(f"tls: there is no file {path}")
    # The empty password makes an encrypted key fail at once; without one OpenSSL asks for it on the terminal.
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certfile, tls.keyfile, password="")
    except (OSError, ValueError) as error:
        cause = "the key is encrypted" if isinstance(error, ValueError) else error.strerror or str(error)
        raise InvalidInput(
            f"tls: {tls.certfile} and {tls.keyfile} are no pair of PEM certificate and key: {cause}"
        ) from error


def bind(host: str, port: int, *, has_keys: bool = False) -> socket.socket:
    """Open a listening socket, on a loopback address unless there are API keys.

    Raises:
        InvalidInput: an unknown host, one that is open to others without keys, a port that is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidInput(f"host {host!r} has no address: {error.strerror}") from error
    family, _, _, _, address = found[0]
    if not has_keys and not is_loopback(str(address[0])):
        raise InvalidInput(f"host {host!r} is open to others; without API keys it binds to loopback only")
    try:
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            way_out = "stop what uses it, or choose another with --port (0 takes a free one)"
            raise InvalidInput(f"port {port} on {host} is in use; {way_out}") from error
        raise InvalidInput(f"port {port} on {host} cannot be had: {error.strerror}") from error


def service_of(settings: ServiceSettings, access: Access) -> Service:
    """Build the service that the settings describe, with nothing started yet.

    Raises:
        InvalidInput: a teacher that cannot have its replicas. PotstillError: the cache cannot be opened.
    """
    from potstill.cache.cache import Cache  # noqa: PLC0415  zarr, only when a service runs
    from potstill.cache.read_through import KeepPolicy  # noqa: PLC0415

    cache = None if settings.cache is None else Cache.open(settings.cache, mode="r+")
    quota_bytes = int(settings.keep.journal_quota_gib * 2**30)
    policy = KeepPolicy(k=settings.keep.k, encoding=settings.keep.encoding, quota_bytes=quota_bytes)
    keep = None if cache is None else Keep(cache, policy)
    source = TeacherSource(keep, settings.ray)
    teachers = [source.host(teacher) for teacher in settings.teachers]
    return Service(teachers, cache=cache, limits=settings.limits, source=source, access=access)


class _Server(BoundedServer):
    """Stops on signals without raising them again, as uvicorn does: a service that was told to stop has succeeded."""

    on_hangup: Callable[[], None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[[], None]] = {
            number: partial(self.handle_exit, number, None) for number in (signal.SIGINT, signal.SIGTERM)
        }
        if self.on_hangup is not None:
            handlers[signal.SIGHUP] = self.on_hangup
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


async def _serve(settings: ServiceSettings, access: Access, listener: socket.socket, tracer: OtelTracer | None) -> None:
    service = service_of(settings, access)
    # The teachers are started here and not by the app's lifespan, whose failures uvicorn would swallow.
    server = _Server(
        create_app(service, tracer=tracer),
        settings.limits,
        lifespan="off",
        timeout_graceful_shutdown=settings.grace_seconds,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        ssl_certfile=None if settings.tls is None else settings.tls.certfile,
        ssl_keyfile=None if settings.tls is None else settings.tls.keyfile,
    )
    server.on_hangup = None if access.keys is None else access.keys.reload
    async with service.running():
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        starting = asyncio.create_task(service.started())
        if sys.stderr.isatty() and settings.teachers:
            # An engine takes its time, and somebody who looks on would take silence for a hang.
            print("opening the teachers; an engine may take a minute", file=sys.stderr)  # noqa: T201
        # It serves while teachers start, so that health checks and other teachers are answered.
        try:
            await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and starting.exception() is None:
                _tell_ready(settings, service, listener)
                await serving
        finally:
            server.should_exit = True
            starting.cancel()
            await asyncio.wait({serving, starting})
        if not starting.cancelled():
            starting.result()
        serving.result()


def _tell_ready(settings: ServiceSettings, service: Service, listener: socket.socket) -> None:
    """Print the one line on stdout, which scripts wait for; as JSON where the log is, as both may be collected."""
    line = ready_line(settings, service, listener)
    if settings.logs.format == "json":
        record = logging.makeLogRecord({"name": __name__, "levelno": logging.INFO, "levelname": "INFO", "msg": line})
        line = logs.JsonLines().format(record)
    print(line, flush=True)  # noqa: T201


def ready_line(settings: ServiceSettings, service: Service, listener: socket.socket) -> str:
    """The line `ready: URL teachers NAME (MODEL), ...`, with the teachers that are up."""
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    up = [teacher for teacher in settings.teachers if service.teachers[teacher.name].state != "failed"]
    teachers = ", ".join(f"{teacher.name} ({without_login(teacher.model)})" for teacher in up)
    scheme = "http" if settings.tls is None else "https"
    return f"ready: {scheme}://{where}:{port} teachers {teachers}"
