"""Reading a service from threads: kept connections, retries, and answers taken as they arrive."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import httpx

from potstill.cache.errors import DeadlineExceeded, InvalidInput, TeacherFailed, Unavailable, WireVersionError
from potstill.cache.wire import scores as wire
from potstill.cache.wire.stream import CutShort, StreamReader
from potstill.clients.retry import (
    API_KEY_VARIABLE,
    Refusal,
    RetryPolicy,
    checked_key,
    checked_url,
    login_of,
    refusal_from,
)

T = TypeVar("T")
_SILENCE_SECONDS = 60.0
_ARROW_HEADERS = {"accept": wire.ARROW_MEDIA_TYPE, "content-type": wire.ARROW_MEDIA_TYPE}


class Reads:
    """One service. Safe to share between threads; a context manager, or call `close`.

    Args:
        url: where the service is, like `http://127.0.0.1:8700`.
        api_key: sent as a bearer token; that of the variable `POTSTILL_API_KEY` when not given.
        timeout: seconds that may pass without anything new, retries included.
        retry: how to try again what may be tried again; `RetryPolicy()` when not given.

    Raises:
        InvalidInput: not the URL of a service, or a number that makes no sense.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 600.0, retry: RetryPolicy | None = None
    ) -> None:
        if not 0 < timeout < math.inf:
            raise InvalidInput(f"timeout is {timeout}; it must be a positive number of seconds")
        self.url = checked_url(url)
        self._timeout = timeout
        self._retry = retry or RetryPolicy()
        self._closed = threading.Event()
        headers = {"user-agent": "potstill", "accept-encoding": "identity", wire.FORMAT_HEADER: wire.WIRE_VERSION}
        api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        if api_key:
            headers["authorization"] = f"Bearer {checked_key(api_key)}"
        # Silence is bounded by itself: a service that reads from far away may take long between two blocks.
        times = httpx.Timeout(min(_SILENCE_SECONDS, timeout), connect=min(10.0, timeout), pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        self._client = httpx.Client(
            base_url=self.url, auth=login_of(url), headers=headers, timeout=times, limits=limits
        )

    def __enter__(self) -> Self:
        """The same; nothing is sent yet."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Disconnect. Who waits to try again in another thread sees `Unavailable` at once."""
        self._closed.set()
        self._client.close()

    def json(self, path: str, *, method: str = "GET", body: Any = None) -> dict[str, Any]:
        """A JSON object of our wire version.

        Raises:
            WireVersionError: of another version. TeacherFailed: not JSON, or not an object.
            PotstillError: what the service refuses with, as the same class.
        """

        def call() -> dict[str, Any]:
            headers = {"accept": wire.JSON_MEDIA_TYPE}
            reply = self._sent(self._client.build_request(method, path, json=body, headers=headers))
            try:
                value = reply.json()
            except (ValueError, RecursionError) as error:
                raise TeacherFailed(f"{self.url}{path} did not answer JSON; is it a Potstill service?") from error
            if not isinstance(value, dict):
                raise TeacherFailed(f"{self.url}{path} did not answer a JSON object; is it a Potstill service?")
            wire.require_version(str(value.get("format", "none"))[:40])
            return value

        return self.patiently(call)

    def text(self, path: str) -> str:
        """A text as it is; raises as `json` does."""

        def call() -> str:
            reply = self._sent(self._client.build_request("GET", path))
            wire.require_version(reply.headers.get(wire.FORMAT_HEADER, "none")[:40])
            return reply.text

        return self.patiently(call)

    @contextmanager
    def stream(
        self, path: str, *, params: Mapping[str, Any] | None = None, body: bytes | None = None
    ) -> Iterator[StreamReader]:
        """An Arrow stream that arrives while it is read: GET, or POST of a body. It is not tried again.

        Raises:
            Refusal: what may be tried again, like an answer that breaks off; also in the block.
            PotstillError: as `json`; also in the block.
        """
        request = self._client.build_request(
            "GET" if body is None else "POST", path, params=params, content=body, headers=_ARROW_HEADERS
        )
        try:
            reply = self._client.send(request, stream=True)
        except (httpx.TransportError, RuntimeError) as error:
            raise self._refusal(error) from error
        arriving = _Arriving(reply)
        try:
            if reply.status_code != httpx.codes.OK:
                whole = httpx.Response(reply.status_code, headers=reply.headers, content=arriving.read())
                raise refusal_from(whole, self.url)
            if reply.headers.get("content-type", "").partition(";")[0] != wire.ARROW_MEDIA_TYPE:
                raise TeacherFailed(f"{self.url}{path} did not answer Arrow; is it a Potstill service?")
            yield StreamReader(arriving)
            if arriving.read() and arriving.error is None:
                raise TeacherFailed(f"{self.url}{path} goes on after its end")
        except CutShort as error:
            cause = arriving.error or error
            raise Refusal(Unavailable(f"the answer of {self.url}{path} was cut short: {cause}")) from error
        except WireVersionError:
            raise
        except InvalidInput as error:
            raise TeacherFailed(f"{self.url}{path} answered nonsense: {error.detail}") from error
        finally:
            reply.close()

    def patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns, tried again as the policy says.

        Raises:
            DeadlineExceeded: no time is left to try again. PotstillError: what may not be tried again.
        """
        patience = self.patience()
        while True:
            try:
                return call()
            except Refusal as refusal:
                patience.wait(refusal)

    def patience(self) -> Patience:
        """For work that gets on between its failures."""
        return Patience(self._retry, self._timeout, self._closed)

    def _sent(self, request: httpx.Request) -> httpx.Response:
        try:
            reply = self._client.send(request)
        except (httpx.TransportError, RuntimeError) as error:
            raise self._refusal(error) from error
        if reply.status_code != httpx.codes.OK:
            raise refusal_from(reply, self.url)
        return reply

    def _refusal(self, error: Exception) -> Refusal:
        # A closed client raises RuntimeError.
        if isinstance(error, RuntimeError) and not self._closed.is_set():
            raise error
        return Refusal(Unavailable(f"{self.url} cannot be reached: {str(error) or type(error).__name__}"))


class Patience:
    """How often, and for how long, work is tried again that does not get on."""

    def __init__(self, retry: RetryPolicy, timeout: float, closed: threading.Event) -> None:
        self._retry = retry
        self._timeout = timeout
        self._closed = closed
        self.got_on()

    def got_on(self) -> None:
        """Something new arrived: begin to count anew."""
        self._failures = 0
        self._deadline = time.monotonic() + self._timeout

    def wait(self, refusal: Refusal) -> None:
        """Wait until the next try.

        Raises:
            DeadlineExceeded: no time is left for it. Unavailable: closed meanwhile.
            PotstillError: the refusal's, when it may not be tried again, or not before the deadline.
        """
        self._failures += 1
        if self._closed.is_set():
            raise Unavailable("the connection to the service was closed") from refusal
        if not self._retry.tries_again(self._failures, refusal):
            raise refusal.error from refusal.__cause__
        if refusal.is_for_later(self._deadline - time.monotonic()):
            raise refusal.error from refusal.__cause__
        seconds = self._retry.wait_seconds(self._failures, refusal.retry_after)
        if time.monotonic() + seconds >= self._deadline:
            raise DeadlineExceeded(f"no time left to try again; {refusal.error.detail}") from refusal
        self._closed.wait(seconds)


class _Arriving:
    """A body as the file that pyarrow reads. What breaks it off is kept, and looks like its end."""

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
