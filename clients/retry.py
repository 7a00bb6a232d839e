"""One service over HTTP: what a reply means, when to try a call again, and how long to wait first."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from potstill.cache.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    PotstillError,
    TeacherFailed,
    Unavailable,
    error_class,
)
from potstill.cache.logins import without_login
from potstill.cache.types import JSON

T = TypeVar("T")
API_KEY_VARIABLE = "POTSTILL_API_KEY"
"""Holds the API key for every service that is called without one, so that no command line shows it."""


class Refusal(Exception):
    """An error, and the seconds after which the service wants to hear from us again.

    `named` says that the service itself answered with the error, so that it did nothing of what was asked.
    """

    def __init__(self, error: PotstillError, retry_after: float | None = None, *, named: bool = False) -> None:
        super().__init__(error.detail)
        self.error = error
        self.retry_after = retry_after
        self.named = named

    @property
    def may_be_done(self) -> bool:
        """Whether the service may have done what was asked all the same, and only its answer was lost."""
        unsent = isinstance(self.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
        return not self.named and not unsent

    def is_for_later(self, seconds_left: float) -> bool:
        """Whether the service named a time to come back that is not in what is left.

        Who calls us may have that time, and DeadlineExceeded would tell them not to come back.
        """
        return self.retry_after is not None and self.retry_after >= seconds_left


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter: a random wait, so that clients turned away together spread out.

    Raises:
        InvalidInput: fewer than one attempt, or a negative wait.
    """

    attempts: int = 8
    """Calls in total; 1 never tries again. While the service itself names a time to come back (Retry-After:
    it is there, but starting or busy), only the deadline ends the tries."""
    base: float = 0.25
    """Seconds: the upper end of the first wait; each later one doubles it."""
    cap: float = 15.0
    """Seconds: no upper end is above this. A longer Retry-After of the service is honoured."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base < 0 or self.cap < 0:
            raise InvalidInput(f"{self} needs at least one attempt and no negative seconds")

    def tries_again(self, failures: int, refusal: Refusal) -> bool:
        """Whether to call again after that many failures."""
        invited = refusal.retry_after is not None and self.attempts > 1
        return refusal.error.retryable and (invited or failures < self.attempts)

    def wait_seconds(self, failures: int, retry_after: float | None) -> float:
        """How long to wait after that many failures; at least `retry_after`, plus jitter."""
        jitter = random.uniform(0.0, min(self.cap, self.base * 2.0 ** min(failures - 1, 60)))  # noqa: S311
        return jitter if retry_after is None else retry_after + jitter


async def with_retries(policy: RetryPolicy, call: Callable[[], Awaitable[T]], *, deadline: float) -> T:
    """Await `call()` until it returns, fails for good, or the event loop's clock is at `deadline`.

    Raises:
        DeadlineExceeded: the time is over, or the next attempt would begin after it.
        PotstillError: what `call` put into a `Refusal` that may not be retried, or the last one; also one that named
            a time to come back, its `retry_after`, which is after the deadline.
    """
    clock = asyncio.get_running_loop().time
    failures = 0
    last = "no answer yet"
    while True:
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await call()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"the deadline passed; {last}") from error
        except Refusal as refusal:
            failures += 1
            if not policy.tries_again(failures, refusal):
                raise refusal.error from refusal.__cause__
            last = f"attempt {failures} met {refusal.error.kind}: {refusal.error.detail}"
            wait = policy.wait_seconds(failures, refusal.retry_after)
            if refusal.is_for_later(deadline - clock()):
                raise refusal.error from refusal.__cause__
            if clock() + wait >= deadline:
                raise DeadlineExceeded(f"no time left to try again; {last}") from refusal.error
        await asyncio.sleep(wait)


class Connection:
    """One service over HTTP: bounded requests under way, retries, and errors as our own classes."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, *, timeout: float, max_in_flight: int, retry: RetryPolicy
    ) -> None:
        self.url = url
        self.timeout = timeout
        self._client = client
        self._retry = retry
        self._slots = asyncio.Semaphore(max_in_flight)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,  # noqa: ASYNC109  seconds per call, retries included
        max_in_flight: int = 8,
        retry: RetryPolicy | None = None,
    ) -> AsyncIterator[Connection]:
        """Check the URL and hold the sockets; nothing is sent yet.

        The API key is that of the environment (`POTSTILL_API_KEY`) when none is given.

        Raises:
            InvalidInput: not an `http://host:port` or `https://` URL, a number that makes no sense, or a key that no
                header can hold.
        """
        login, url = login_of(url), checked_url(url)
        if not 0 < timeout < math.inf or max_in_flight < 1:
            raise InvalidInput("timeout must be a positive number of seconds, max_in_flight at least 1")
        headers = {"user-agent": "potstill"}
        api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        if api_key:
            headers["authorization"] = f"Bearer {checked_key(api_key)}"
        # The deadline of the call bounds everything but the connection, which fails fast to be tried again.
        times = httpx.Timeout(None, connect=min(10.0, timeout))
        limits = httpx.Limits(max_connections=max_in_flight)
        async with httpx.AsyncClient(base_url=url, auth=login, headers=headers, timeout=times, limits=limits) as client:
            yield cls(client, url, timeout=timeout, max_in_flight=max_in_flight, retry=retry or RetryPolicy())

    async def get_json(self, path: str) -> dict[str, Any]:
        """GET a JSON object."""
        return self._object(path, await self._call("GET", path, deadline=None))

    async def put_json(self, path: str, value: JSON) -> dict[str, Any]:
        """PUT JSON, get a JSON object."""
        headers = {"content-type": "application/json"}
        body = json.dumps(value).encode()
        return self._object(path, await self._call("PUT", path, body=body, headers=headers, deadline=None))

    async def delete_json(self, path: str) -> dict[str, Any] | None:
        """DELETE, get a JSON object; None when it is gone after an earlier try whose answer did not come."""
        refusals: list[Refusal] = []
        try:
            content = await self._call("DELETE", path, deadline=None, refusals=refusals)
        except NotFound:
            if any(refusal.may_be_done for refusal in refusals[:-1]):
                return None
            raise
        return self._object(path, content)

    async def post(self, path: str, body: bytes, *, headers: Mapping[str, str], deadline: float) -> bytes:
        """POST bytes, get bytes; `deadline` is on the event loop's clock."""
        return await self._call("POST", path, body=body, headers=headers, deadline=deadline)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        deadline: float | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        refusals: list[Refusal] | None = None,
    ) -> bytes:
        """The reply's body. Every refusal is added to `refusals`."""
        clock = asyncio.get_running_loop().time
        ends = clock() + self.timeout if deadline is None else deadline

        async def once() -> bytes:
            # A call that waits to be tried again holds no slot.
            async with self._slots:
                remaining = f"{max(0.001, ends - clock()):.3f}"
                all_headers = {**(headers or {}), "potstill-timeout": remaining}
                try:
                    return await self._send(self._client.build_request(method, path, content=body, headers=all_headers))
                except Refusal as refusal:
                    if refusals is not None:
                        refusals.append(refusal)
                    raise

        return await with_retries(self._retry, once, deadline=ends)

    async def _send(self, request: httpx.Request) -> bytes:
        try:
            reply = await self._client.send(request)
        except httpx.DecodingError as error:
            raise Refusal(TeacherFailed(f"{self.url} sent a body that cannot be decoded: {error}")) from error
        except httpx.TransportError as error:
            cause = str(error) or type(error).__name__
            raise Refusal(Unavailable(f"{self.url} cannot be reached: {cause}")) from error
        if not reply.is_success:
            raise refusal_from(reply, self.url)
        return reply.content

    def _object(self, path: str, content: bytes) -> dict[str, Any]:
        value = _json(content)
        if not isinstance(value, dict):
            raise TeacherFailed(f"{self.url}{path} did not answer a JSON object; is it a Potstill service?")
        return value


def checked_key(api_key: str) -> str:
    """A key as a header can hold it.

    Raises:
        InvalidInput: it has other characters.
    """
    key = api_key.strip()  # as a file or a shell may have put a line end behind it
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidInput("the API key has characters that no key has; give it as `potstill keys add` printed it")
    return key


def login_of(url: str) -> tuple[str, str] | None:
    """The user and password in a URL; None when it has none.

    Raises:
        InvalidInput: not a URL.
    """
    parsed = _parsed(url)
    return (parsed.username, parsed.password) if parsed.userinfo else None


def checked_url(url: str) -> str:
    """The URL without a trailing slash and without what `login_of` has of it, so that messages may show it.

    Raises:
        InvalidInput: no http or https scheme, no host, a bad port, or a query or fragment.
    """
    parsed = _parsed(url)
    if re.search(r"\s", url):
        raise InvalidInput("the URL of the service has a space in it; write http://host:port, with %20 for a space")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise InvalidInput(f"{url!r} has port {parsed.port}; a port is a number from 1 to 65535")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise InvalidInput(f"{url!r} is not the URL of a service; write http://host:port")
    return without_login(str(parsed)).rstrip("/")


def _parsed(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        why = "" if "@" in str(url) else f": {error}"  # which may quote a part of a password
        raise InvalidInput(f"{str(url)!r} is not a URL{why}; write http://host:port") from error


def refusal_from(reply: httpx.Response, url: str) -> Refusal:
    """The error that a reply stands for: what the service named, or what the status says of a proxy."""
    value = _json(reply.content)
    after = _seconds(reply.headers.get("retry-after"))
    if isinstance(value, dict) and isinstance(value.get("kind"), str):
        error = error_class(value["kind"])(str(value.get("detail", "")), retry_after=after)
        return Refusal(error, after, named=True)
    detail = f"{url} answered {reply.status_code} without saying why; is it a Potstill service?"
    by_status: dict[int, type[PotstillError]] = {
        429: Overloaded,
        502: Unavailable,
        503: Unavailable,
        504: Unavailable,
    }
    return Refusal(by_status.get(reply.status_code, TeacherFailed)(detail, retry_after=after), after)


def _seconds(retry_after: str | None) -> float | None:
    # The other form, a date, needs equal clocks; our service sends seconds only.
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
