"""Calls to one service for code without an event loop, and streams that arrive while they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import httpx

from potstill.cache.errors import InvalidInput, TeacherFailed, Unavailable, WireVersionError
from potstill.cache.forks import PerProcess
from potstill.cache.types import JSON
from potstill.cache.wire import StreamReader, scores as wire
from potstill.cache.wire.messages import CutShort
from potstill.clients.connection import Connection, next_bytes
from potstill.clients.loop_thread import LoopThread
from potstill.clients.retry import Refusal, RetryPolicy, Tries

T = TypeVar("T")
BLOCK_BYTES = 64 * 2**20
"""Most bytes of a stream's record batch; the service sends blocks of a few MiB."""
_SILENCE_SECONDS = 60.0
"""Longest wait for the next bytes of one answer, after which the connection counts as dead."""
_FORMAT = {wire.FORMAT_HEADER: wire.WIRE_VERSION}
_ARROW_HEADERS = {"accept": wire.ARROW_MEDIA_TYPE, "content-type": wire.ARROW_MEDIA_TYPE, **_FORMAT}


class SyncConnection(AbstractContextManager["SyncConnection"]):
    """A `Connection` for threads, any number of which may share it. A context manager, or call `close`.

    `timeout` bounds a call, retries included. For a read of many blocks it bounds the wait for the next one: a read of
    hours may go on as long as blocks arrive, as a service that reads from far away takes its time between two of them.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 600.0, retry: RetryPolicy | None = None
    ) -> None:
        """Check the address; nothing is sent yet."""
        self._reconnect = partial(SyncConnection, url, api_key=api_key, timeout=timeout, retry=retry)
        silence = min(_SILENCE_SECONDS, timeout)
        # A forked child has neither the thread, nor may it use the sockets, which are the parent's too.
        self._connections = PerProcess(
            lambda: Connection(url, api_key=api_key, timeout=timeout, max_in_flight=None, retry=retry, silence=silence)
        )
        self.url = self._connection.url
        closed = f"the connection to {self.url} was closed"
        self._threads = PerProcess(lambda: LoopThread("potstill http", closed=closed))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address, with the API key if one was given, which is connected to anew."""
        return self._reconnect, ()

    @property
    def _connection(self) -> Connection:
        return self._connections.get()

    @property
    def _thread(self) -> LoopThread:
        return self._threads.get()

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Disconnect. A thread that waits raises `Unavailable` at once."""
        self._thread.close(self._connection.close)

    def json(self, path: str, *, method: str = "GET", body: JSON = None) -> dict[str, Any]:
        """Send a request and return the JSON object of the reply, which says our wire version.

        Raises:
            WireVersionError: the service speaks another version. TeacherFailed: the reply is no JSON object.
            DeadlineExceeded: no time is left to try again.
            PotstillError: an error that may not be tried again, as the class that the service named.
        """
        headers = {"accept": wire.JSON_MEDIA_TYPE, **_FORMAT}
        value = self._thread.run(self._connection.json, path, method=method, body=body, headers=headers)
        wire.require_version(str(value.get("format", "none"))[:40])
        return value

    def text(self, path: str, most_bytes: int) -> str:
        """Fetch a text of at most `most_bytes` as it is; raises as `json` does."""
        headers = {"accept": "*/*", **_FORMAT}
        answer = self._thread.run(self._connection.send, "GET", path, most_bytes, headers=headers)
        wire.require_version(answer.headers.get(wire.FORMAT_HEADER, "none")[:40])
        try:
            return answer.content.decode()
        except UnicodeDecodeError as error:
            raise TeacherFailed(f"{self.url}{path} did not answer a text: {error}") from error

    def parts(
        self, read: Callable[[int, Tries], Iterable[T]], total: int, size: Callable[[T], int] = lambda _: 1
    ) -> Iterator[T]:
        """Yield the parts of a whole of `total` elements, in order; a part has `size(part)` of them.

        `read(at, tries)` streams parts from element `at` on, for as long as `tries` has time left. It is called at
        least once, and again until all are there: at the element where its last stream ended or broke off.

        Raises:
            DeadlineExceeded: no time is left to try again. PotstillError: as `stream`; an error that may not be
                tried again.
        """
        tries, at = self._connection.tries(), 0
        while True:
            try:
                for part in read(at, tries):
                    yield part
                    at += size(part)
                    if size(part):
                        tries.got_on()  # only a stream that never gets on is given up
                if at >= total:
                    return
            except Refusal as refusal:
                self._thread.run(asyncio.sleep, tries.wait_seconds(refusal))

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        tries: Tries,
        params: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        most_bytes: int = BLOCK_BYTES,
    ) -> Iterator[StreamReader]:
        """Open an Arrow stream that arrives while it is read: by GET, or by POST of `body`. It is not tried again.

        Raises, also within the block:
            Refusal: an error that may pass, like an answer that breaks off. DeadlineExceeded: `tries` has no time left.
            TeacherFailed: a record batch is over `most_bytes`. PotstillError: as `json`.
        """
        method = "GET" if body is None else "POST"
        open_it = partial(self._connection.open, method, path, params=params, content=body, headers=_ARROW_HEADERS)
        reply = self._run(tries, open_it)
        arriving = _Arriving(reply, partial(self._run, tries), most_bytes)
        try:
            if reply.headers.get("content-type", "").partition(";")[0] != wire.ARROW_MEDIA_TYPE:
                raise TeacherFailed(f"{self.url}{path} did not answer Arrow; is it a Potstill service?")
            yield StreamReader(arriving)
            # Read to the very end: httpx keeps a connection for the next request only when nothing is left in it.
            if arriving.read(1) and arriving.error is None:
                raise TeacherFailed(f"{self.url}{path} goes on after its end")
        except CutShort as error:
            told = f"the answer of {self.url}{path} was cut short: {arriving.error or error}"
            raise Refusal(Unavailable(told), may_be_done=True) from error
        except WireVersionError:
            raise
        except InvalidInput as error:
            raise TeacherFailed(f"{self.url}{path} answered nonsense: {error.detail}") from error
        finally:
            with suppress(Unavailable):  # closed meanwhile, and the reply with it
                self._thread.run(reply.aclose)

    def _run(self, tries: Tries, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def in_time() -> T:
            return await self._connection.in_time(tries, call())

        return self._thread.run(in_time)


class _Arriving:
    """The body of a reply, as `StreamReader` reads it. An error that breaks it off is kept, and reads as its end."""

    def __init__(
        self, reply: httpx.Response, run: Callable[[Callable[[], Coroutine[Any, Any, bytes]]], bytes], most: int
    ) -> None:
        self.error: Exception | None = None
        self._chunks = reply.aiter_raw()
        self._held = bytearray()
        self._run = run
        self._most = most

    def read(self, size: int) -> bytes:
        """Read the next `size` bytes, fewer only at the end.

        Raises:
            InvalidInput: `size` is over the bound.
        """
        if size > self._most:
            raise InvalidInput(f"a record batch has {size} bytes, at most {self._most} were asked for")
        missing = size - len(self._held)
        if missing > 0:
            # All that has arrived is taken at once: a small batch, like that of a row, is not worth a turn of the loop.
            try:
                self._held += self._run(partial(next_bytes, self._chunks, missing))
            except (httpx.TransportError, httpx.StreamError) as error:
                self.error = error
        data = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        return data
