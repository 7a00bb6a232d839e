"""Calls to one service over HTTP, which are tried again; replies become our own values and errors.

`Connection` is for async code, `SyncConnection` for threads. Both read replies and errors alike; a `Connection` has a
deadline for each piece of work, a `SyncConnection` a longest time without anything new.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import httpx

from potstill.cache.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    PotstillError,
    TeacherFailed,
    Unavailable,
    WireVersionError,
    error_class,
)
from potstill.cache.types import JSON
from potstill.cache.wire import StreamReader, scores as wire
from potstill.cache.wire.messages import CutShort
from potstill.clients.address import checked_url, key_header, login_of
from potstill.clients.retry import Refusal, RetryPolicy, Tries

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
"""A host that is there accepts in milliseconds; one that is not must leave time to try again."""
_SILENCE_SECONDS = 60.0
"""Longest wait for the next bytes of one answer, after which the connection counts as dead."""
_ARROW_HEADERS = {"accept": wire.ARROW_MEDIA_TYPE, "content-type": wire.ARROW_MEDIA_TYPE}
_BY_STATUS: Mapping[int, type[PotstillError]] = {429: Overloaded, 502: Unavailable, 503: Unavailable, 504: Unavailable}
"""Errors by HTTP status, for replies without a `kind`: those of a proxy in between, which may pass."""


class _Service:
    """Address, API key and retry policy of a service, and the reading of its replies.

    Args:
        url: where the service is, like `http://127.0.0.1:8700`.
        api_key: sent as a bearer token; that of the variable `POTSTILL_API_KEY` when not given.
        timeout: seconds that one piece of work may take, retries included.
        retry: how to try again what may be tried again; `RetryPolicy()` when not given.

    Raises:
        InvalidInput: not the URL of a service, a number that makes no sense, or a key that no header can hold.
    """

    _client: httpx.Client | httpx.AsyncClient

    def __init__(self, url: str, *, api_key: str | None, timeout: float, retry: RetryPolicy | None) -> None:
        if not 0 < timeout < math.inf:
            raise InvalidInput(f"timeout is {timeout}; it must be a positive number of seconds")
        self.url = checked_url(url)
        self.timeout = timeout
        self._retry = retry or RetryPolicy()
        headers = {"user-agent": "potstill", **key_header(api_key)}
        self._options: dict[str, Any] = {"base_url": self.url, "auth": login_of(url), "headers": headers}

    def tries(self, seconds: float | None = None) -> Tries:
        """Tries of one piece of work, which is given up in `seconds` from now, or in `timeout` seconds."""
        return Tries(self._retry, self.timeout if seconds is None else seconds)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raise errors of httpx as our own; a `Refusal` where another try may succeed."""
        try:
            yield
        except httpx.DecodingError as error:
            raise TeacherFailed(f"{self.url} sent a body that cannot be decoded: {error}") from error
        except httpx.TransportError as error:
            # Nothing was sent before there was a connection; after that the service may have done its work.
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            told = f"{self.url} cannot be reached: {str(error) or type(error).__name__}"
            raise Refusal(Unavailable(told), may_be_done=not unsent) from error
        except RuntimeError as error:
            # httpx has no class of its own for a client that another thread closed meanwhile.
            if not self._client.is_closed:
                raise
            raise self._closed_error() from error

    def _closed_error(self) -> Unavailable:
        return Unavailable(f"the connection to {self.url} was closed")

    def _accepted(self, reply: httpx.Response) -> httpx.Response:
        """The reply, if it is a success.

        Raises:
            Refusal: otherwise, with the error that the service named, or the one that the HTTP status stands for.
        """
        if reply.is_success:
            return reply
        value = _parsed(reply.content)
        after = _seconds(reply.headers.get("retry-after"))
        if isinstance(value, dict) and isinstance(value.get("kind"), str):
            # The service answered by itself, so it knows that it did nothing.
            error = error_class(value["kind"])(str(value.get("detail", "")), retry_after=after)
            raise Refusal(error, may_be_done=False)
        detail = f"{self.url} answered {reply.status_code} without saying why; is it a Potstill service?"
        error = _BY_STATUS.get(reply.status_code, TeacherFailed)(detail, retry_after=after)
        raise Refusal(error, may_be_done=True)

    def _object(self, path: str, content: bytes) -> dict[str, Any]:
        value = _parsed(content)
        if not isinstance(value, dict):
            raise TeacherFailed(f"{self.url}{path} did not answer a JSON object; is it a Potstill service?")
        return value


class Connection(_Service):
    """A service for async code, with a bound on the requests under way at once. An async context manager.

    Args and errors are those of both kinds of connection; `max_in_flight` is the bound, at least 1.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_in_flight: int = 8,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Check the address; nothing is sent yet."""
        super().__init__(url, api_key=api_key, timeout=timeout, retry=retry)
        if max_in_flight < 1:
            raise InvalidInput(f"max_in_flight is {max_in_flight}; at least 1 request must be under way")
        # The deadline of the call bounds everything but the connection, which fails fast to be tried again.
        times = httpx.Timeout(None, connect=min(_CONNECT_SECONDS, timeout))
        limits = httpx.Limits(max_connections=max_in_flight)
        self._client: httpx.AsyncClient = httpx.AsyncClient(timeout=times, limits=limits, **self._options)
        self._slots = asyncio.Semaphore(max_in_flight)

    async def __aenter__(self) -> Self:
        """Return the connection; nothing is sent yet."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Disconnect."""
        await self._client.aclose()

    async def json(
        self, path: str, *, method: str = "GET", body: JSON = None, tries: Tries | None = None
    ) -> dict[str, Any]:
        """Send a request and return the JSON object of the reply.

        Raises:
            TeacherFailed: the reply is no JSON object. PotstillError: as `send`.
        """
        return self._object(path, await self.send(method, path, tries=tries, json=body))

    async def send(
        self,
        method: str,
        path: str,
        *,
        tries: Tries | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> bytes:
        """Send a request until there is an answer; return the reply's body. `body` is httpx's `content` or `json`.

        Raises:
            DeadlineExceeded: no time is left to try again.
            PotstillError: an error that may not be tried again, as the class that the service named.
        """
        tries = tries or self.tries()
        while True:
            try:
                async with asyncio.timeout(tries.seconds_left) as limit:
                    return await self._once(method, path, tries, headers or {}, body)
            except TimeoutError as error:
                if not limit.expired():  # somebody else's timeout, around this call
                    raise
                raise DeadlineExceeded(f"the deadline passed; {tries.last}") from error
            except Refusal as refusal:
                wait = tries.wait_seconds(refusal)
            await asyncio.sleep(wait)

    async def _once(
        self, method: str, path: str, tries: Tries, headers: Mapping[str, str], body: dict[str, Any]
    ) -> bytes:
        # A call that waits to be tried again holds no slot. The service learns how long we still wait, and does not
        # begin what nobody will read.
        async with self._slots:
            remaining = {"potstill-timeout": f"{max(0.001, tries.seconds_left):.3f}"}
            request = self._client.build_request(method, path, headers={**headers, **remaining}, **body)
            with self._refusals():
                return self._accepted(await self._client.send(request)).content


class SyncConnection(_Service):
    """A service for threads, any number of which may share it. A context manager, or call `close`.

    `timeout` bounds silence, not the whole work: seconds that may pass without anything new, retries included.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 600.0, retry: RetryPolicy | None = None
    ) -> None:
        """Check the address; nothing is sent yet."""
        super().__init__(url, api_key=api_key, timeout=timeout, retry=retry)
        # A read of hours may go on as long as blocks arrive: a service that reads from far away takes its time between
        # two of them. Threads bound themselves, so connections are not counted; idle ones are kept for the next read.
        times = httpx.Timeout(min(_SILENCE_SECONDS, timeout), connect=min(_CONNECT_SECONDS, timeout), pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        self._client: httpx.Client = httpx.Client(timeout=times, limits=limits, **self._options)
        # Streams are read raw, as they arrive: nothing may compress them on the way.
        self._client.headers.update({"accept-encoding": "identity", wire.FORMAT_HEADER: wire.WIRE_VERSION})
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        """Return the connection; nothing is sent yet."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Disconnect. A thread that waits to try again raises `Unavailable` at once."""
        self._closed.set()
        self._client.close()

    def json(self, path: str, *, method: str = "GET", body: JSON = None) -> dict[str, Any]:
        """Send a request and return the JSON object of the reply, which says our wire version.

        Raises:
            WireVersionError: the service speaks another version. TeacherFailed: the reply is no JSON object.
            DeadlineExceeded: no time is left to try again.
            PotstillError: an error that may not be tried again, as the class that the service named.
        """
        value = self._object(path, self._send(method, path, json=body, accept=wire.JSON_MEDIA_TYPE).content)
        wire.require_version(str(value.get("format", "none"))[:40])
        return value

    def text(self, path: str) -> str:
        """Fetch a text as it is; raises as `json` does."""
        reply = self._send("GET", path, accept="*/*")
        wire.require_version(reply.headers.get(wire.FORMAT_HEADER, "none")[:40])
        return reply.text

    def parts(
        self, read: Callable[[int], Iterable[T]], total: int, size: Callable[[T], int] = lambda _: 1
    ) -> Iterator[T]:
        """Yield the parts of a whole of `total` elements, in order; a part has `size(part)` of them.

        `read(at)` streams parts from element `at` on. It is called at least once, and again until all are there: at
        the element where its last stream ended or broke off.

        Raises:
            DeadlineExceeded: no time is left to try again. PotstillError: as `stream`; an error that may not be
                tried again.
        """
        tries, at = self.tries(), 0
        while True:
            try:
                for part in read(at):
                    yield part
                    at += size(part)
                    tries.got_on()  # only a stream that never gets on is given up
                if at >= total:
                    return
            except Refusal as refusal:
                self._wait(tries, refusal)

    @contextmanager
    def stream(
        self, path: str, *, params: Mapping[str, Any] | None = None, body: bytes | None = None
    ) -> Iterator[StreamReader]:
        """Open an Arrow stream that arrives while it is read: by GET, or by POST of `body`. It is not tried again.

        Raises:
            Refusal: an error that may pass, like an answer that breaks off; also within the block.
            PotstillError: as `json`; also within the block.
        """
        method = "GET" if body is None else "POST"
        request = self._client.build_request(method, path, params=params, content=body, headers=_ARROW_HEADERS)
        with self._refusals():
            reply = self._client.send(request, stream=True)
        arriving = _Arriving(reply)
        try:
            if not reply.is_success:
                with self._refusals():
                    reply.read()
            if self._accepted(reply).headers.get("content-type", "").partition(";")[0] != wire.ARROW_MEDIA_TYPE:
                raise TeacherFailed(f"{self.url}{path} did not answer Arrow; is it a Potstill service?")
            yield StreamReader(arriving)
            # Read to the very end: httpx keeps a connection for the next request only when nothing is left in it.
            if arriving.read() and arriving.error is None:
                raise TeacherFailed(f"{self.url}{path} goes on after its end")
        except CutShort as error:
            told = f"the answer of {self.url}{path} was cut short: {arriving.error or error}"
            raise Refusal(Unavailable(told), may_be_done=True) from error
        except WireVersionError:
            raise
        except InvalidInput as error:
            raise TeacherFailed(f"{self.url}{path} answered nonsense: {error.detail}") from error
        finally:
            reply.close()

    def _send(self, method: str, path: str, *, accept: str, json: JSON = None) -> httpx.Response:
        tries = self.tries()
        while True:
            request = self._client.build_request(method, path, json=json, headers={"accept": accept})
            try:
                with self._refusals():
                    return self._accepted(self._client.send(request))
            except Refusal as refusal:
                self._wait(tries, refusal)

    def _wait(self, tries: Tries, refusal: Refusal) -> None:
        """Wait until the next try.

        Raises:
            Unavailable: closed meanwhile. PotstillError: as `Tries.wait_seconds`.
        """
        if self._closed.is_set() or self._closed.wait(tries.wait_seconds(refusal)):
            raise self._closed_error() from refusal


class _Arriving:
    """The body of a reply as the file that pyarrow reads. An error that breaks it off is kept, and reads as its end."""

    def __init__(self, reply: httpx.Response) -> None:
        self.closed = False
        self.error: Exception | None = None
        self._chunks = reply.iter_raw()
        self._held: list[bytes] = []
        self._size = 0

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left without a size."""
        while (size < 0 or self._size < size) and (chunk := self._next()) is not None:
            self._held.append(chunk)
            self._size += len(chunk)
        data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        rest = b"" if size < 0 else data[size:]
        self._held = [rest] if rest else []
        self._size = len(rest)
        return data if size < 0 else data[:size]

    def _next(self) -> bytes | None:
        try:
            return next(self._chunks, None)
        except (httpx.TransportError, httpx.StreamError) as error:
            self.error = error
            return None


def _seconds(retry_after: str | None) -> float | None:
    # The other form, a date, needs equal clocks; our service sends seconds only.
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # the latter of a body of a thousand brackets
        return None
