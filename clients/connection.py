"""Calls to one service over HTTP, which are tried again; replies become our own values and errors.

A service may be broken, or not be ours. So its answers are read raw, without any content encoding, up to a number of
bytes that the caller states; and one deadline bounds all of a call: connecting, trying again, and a body that dribbles.
`potstill.clients.sync_connection` is the same for threads.
"""

from __future__ import annotations

import asyncio
import json
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from potstill.cache.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    PotstillError,
    TeacherFailed,
    Unavailable,
    error_class,
)
from potstill.cache.forks import PerProcess
from potstill.cache.types import JSON
from potstill.clients.address import checked_url, key_header, login_of
from potstill.clients.retry import Refusal, RetryPolicy, Tries

T = TypeVar("T")
JSON_BYTES = 16 * 2**20
"""Most bytes of a JSON answer: the seal of a corpus of 80,000 files. Parsed it may take twenty times as much."""
_ERROR_BYTES = 2**20
_DETAIL_CHARACTERS = 4096
_CONNECT_SECONDS = 10.0
"""A host that is there accepts in milliseconds; one that is not must leave time to try again."""
_BY_STATUS: Mapping[int, type[PotstillError]] = {429: Overloaded, 502: Unavailable, 503: Unavailable, 504: Unavailable}
"""Errors by HTTP status, for replies without a `kind`: those of a proxy in between, which may pass."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply that was a success."""

    content: bytes
    headers: httpx.Headers


async def next_bytes(chunks: AsyncIterator[bytes], least: int) -> bytes:
    """Wait for `least` bytes of a body or more; there are fewer only at its end."""
    # One buffer, as a body in chunks of one byte would be 40 times larger as a list of them.
    held = bytearray()
    while len(held) < least and (chunk := await anext(chunks, None)) is not None:
        held += chunk
    return bytes(held)


def _trusted_by(url: str) -> ssl.SSLContext | bool:
    """Choose the certificates to trust: none for plain HTTP, as reading them takes longer than a call."""
    return True if httpx.URL(url).scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Connection(AbstractAsyncContextManager["Connection"]):
    """A service for async code, with a bound on the requests under way at once. An async context manager.

    Args:
        url: where the service is, like `http://127.0.0.1:8700`.
        api_key: sent as a bearer token; that of the variable `POTSTILL_API_KEY` when not given.
        timeout: seconds that one piece of work may take, retries included.
        max_in_flight: most requests under way at once, at least 1; None is no bound.
        retry: how to try again what may be tried again; `RetryPolicy()` when not given.
        silence: seconds without a byte after which a connection counts as dead; None waits to the deadline.

    Raises:
        InvalidInput: not the URL of a service, a number that makes no sense, or a key that no header can hold.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_in_flight: int | None = 8,
        retry: RetryPolicy | None = None,
        silence: float | None = None,
    ) -> None:
        """Check the address; nothing is sent yet."""
        if not 0 < timeout < math.inf:
            raise InvalidInput(f"timeout is {timeout}; it must be a positive number of seconds")
        if max_in_flight is not None and max_in_flight < 1:
            raise InvalidInput(f"max_in_flight is {max_in_flight}; at least 1 request must be under way")
        self.url = checked_url(url)
        self.timeout = timeout
        self._retry = retry or RetryPolicy()
        # The deadline of the call bounds everything but the connection, which fails fast to be tried again.
        times = httpx.Timeout(silence, connect=min(_CONNECT_SECONDS, timeout), pool=None)
        limits = httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight or 16)
        # A small compressed body could unpack to any size.
        headers = {"user-agent": "potstill", "accept-encoding": "identity", **key_header(api_key)}
        self._clients = PerProcess(
            lambda: httpx.AsyncClient(
                base_url=self.url,
                auth=login_of(url),
                headers=headers,
                timeout=times,
                limits=limits,
                verify=_trusted_by(self.url),
            )
        )
        self._slots: PerProcess[AbstractAsyncContextManager[None]] = PerProcess(
            lambda: nullcontext() if max_in_flight is None else asyncio.Semaphore(max_in_flight)
        )

    @property
    def _client(self) -> httpx.AsyncClient:
        return self._clients.get()

    async def __aexit__(self, *exc_info: object) -> None:
        """Disconnect."""
        await self.close()

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()

    def tries(self, seconds: float | None = None) -> Tries:
        """Tries of one piece of work, which is given up in `seconds` from now, or in `timeout` seconds."""
        return Tries(self._retry, self.timeout if seconds is None else seconds)

    async def json(
        self,
        path: str,
        *,
        method: str = "GET",
        body: JSON = None,
        tries: Tries | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the JSON object of the reply.

        Raises:
            TeacherFailed: the reply is no JSON object, or over `JSON_BYTES`. PotstillError: as `send`.
        """
        answer = await self.send(method, path, JSON_BYTES, tries=tries, headers=headers, json=body)
        value = _parsed(answer.content)
        if not isinstance(value, dict):
            raise TeacherFailed(f"{self.url}{path} did not answer a JSON object; is it a Potstill service?")
        return value

    async def send(
        self,
        method: str,
        path: str,
        most_bytes: int,
        *,
        tries: Tries | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> Answer:
        """Send a request until there is an answer of at most `most_bytes`. `body` is httpx's `content` or `json`.

        Raises:
            TeacherFailed: the answer is larger, or encoded. DeadlineExceeded: no time is left to try again.
            PotstillError: an error that may not be tried again, as the class that the service named.
        """
        tries = tries or self.tries()
        while True:
            try:
                return await self.in_time(tries, self._once(method, path, most_bytes, tries, headers or {}, body))
            except Refusal as refusal:
                wait = tries.wait_seconds(refusal)
            await asyncio.sleep(wait)

    async def in_time(self, tries: Tries, work: Awaitable[T]) -> T:
        """Await `work`, for as long as `tries` has time left.

        Raises:
            DeadlineExceeded: it has none left.
        """
        try:
            async with asyncio.timeout(tries.seconds_left) as limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():  # somebody else's timeout, around this call
                raise
            raise DeadlineExceeded(f"the deadline passed; {tries.last}") from error

    async def open(self, method: str, path: str, *, headers: Mapping[str, str], **more: Any) -> httpx.Response:
        """Send a request once; return the reply, a success, before its body. The caller closes it.

        Raises:
            Refusal: an error that may pass, or that the service named. TeacherFailed: the body is encoded.
        """
        with self.refusals():
            reply = await self._client.send(
                self._client.build_request(method, path, headers=dict(headers), **more), stream=True
            )
            try:
                encoding = reply.headers.get("content-encoding", "identity")
                if not reply.is_success:
                    plain = encoding == "identity"
                    raise self._refusal(reply, await next_bytes(reply.aiter_raw(), _ERROR_BYTES) if plain else b"")
                if encoding != "identity":
                    raise TeacherFailed(f"{self.url}{path} sent a body encoded as {encoding[:40]!r}, not as it is")
            except BaseException:
                await reply.aclose()
                raise
        return reply

    async def _once(
        self, method: str, path: str, most_bytes: int, tries: Tries, headers: Mapping[str, str], body: dict[str, Any]
    ) -> Answer:
        # A call that waits to be tried again holds no slot. The service learns how long we still wait, and does not
        # begin what nobody will read.
        async with self._slots.get():
            remaining = {"potstill-timeout": f"{max(0.001, tries.seconds_left):.3f}"}
            reply = await self.open(method, path, headers={**headers, **remaining}, **body)
            try:
                with self.refusals():
                    content = await next_bytes(reply.aiter_raw(), most_bytes + 1)
            finally:
                await reply.aclose()
        if len(content) > most_bytes:
            raise TeacherFailed(f"{self.url}{path} answered more than {most_bytes} bytes; is it a Potstill service?")
        return Answer(content, reply.headers)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Raise errors of httpx as our own; a `Refusal` where another try may succeed."""
        try:
            yield
        except httpx.TransportError as error:
            # Nothing was sent before there was a connection; after that the service may have done its work.
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            told = f"{self.url} cannot be reached: {str(error) or type(error).__name__}"
            raise Refusal(Unavailable(told), may_be_done=not unsent) from error
        except RuntimeError as error:
            # httpx has no class of its own for a client that was closed meanwhile.
            if not self._client.is_closed:
                raise
            raise Unavailable(f"the connection to {self.url} was closed") from error

    def _refusal(self, reply: httpx.Response, content: bytes) -> Refusal:
        """Return the error that the service named, or the one that the HTTP status stands for."""
        value = _parsed(content)
        after = _seconds(reply.headers.get("retry-after"))
        if isinstance(value, dict) and isinstance(value.get("kind"), str):
            # The service answered by itself, so it knows that it did nothing.
            error = error_class(value["kind"])(str(value.get("detail", ""))[:_DETAIL_CHARACTERS], retry_after=after)
            return Refusal(error, may_be_done=False)
        detail = f"{self.url} answered {reply.status_code} without saying why; is it a Potstill service?"
        error = _BY_STATUS.get(reply.status_code, TeacherFailed)(detail, retry_after=after)
        return Refusal(error, may_be_done=True)


def _seconds(retry_after: str | None) -> float | None:
    # The other form, a date, needs equal clocks; our service sends seconds only.
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # the latter of a body of a thousand brackets
        return None
