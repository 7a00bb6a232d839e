"""Teachers behind HTTP: the protocol `Teacher` on top of a Potstill service.

`HttpTeacher` is for async code, `SyncHttpTeacher` for threads. `open_http_teacher` is the factory behind
`http://host:port#NAME` wherever a teacher can be named.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self, cast

import numpy as np

from potstill.cache.errors import FormatError, InvalidInput, SpecMismatch, TeacherFailed, Unavailable, WireVersionError
from potstill.cache.forks import PerProcess
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.types import JSON, Fields, Provenance, Targets, TeacherIdentity, TeacherLimits, Tokens
from potstill.cache.wire import scores as wire
from potstill.clients.address import API_KEY_VARIABLE, key_in
from potstill.clients.answers import check_answer, described_identity
from potstill.clients.connection import Connection
from potstill.clients.http_admin import HttpAdmin, teacher_path
from potstill.clients.loop_thread import LoopThread
from potstill.clients.retry import RetryPolicy

REQUEST_TOKENS = 8192
"""Tokens per request: enough to fill an engine's batch, little enough to retry."""
_REQUEST_ROWS = 1024
# Far more than an identity takes, and than Arrow puts around a row's targets.
_HEAD_BYTES = 2**20
_ROW_BYTES = 2**14
_ANSWER_BYTES = 64 * 2**20
"""Size of the largest answer that is asked for; wide fields, like a top-k of thousands, make requests smaller."""


class HttpTeacher:
    """Scores rows on a service. Open it with `async with HttpTeacher.open(url, name) as teacher`.

    Identity, provenance and limits are those that the service stated on opening; an answer of another identity raises
    `SpecMismatch`.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        description: Mapping[str, Any],
        *,
        request_tokens: int,
        store: bool,
    ) -> None:
        self._connection = connection
        self._name = name
        self._store = store
        self._request_tokens = request_tokens
        self.identity = described_identity(description.get("identity"), name, connection.url)
        try:
            self.provenance = Provenance.from_json(_table(description, "provenance"))
        except FormatError as error:
            raise TeacherFailed(f"{connection.url} describes teacher {name!r} badly: {error}") from error
        limits = _table(description, "limits")
        self.limits = TeacherLimits(
            max_top_k=_count(limits.get("max_top_k")), max_row_tokens=_count(limits.get("max_row_tokens"))
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        name: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,  # noqa: ASYNC109
        max_in_flight: int = 8,
        request_tokens: int = REQUEST_TOKENS,
        retry: RetryPolicy | None = None,
        store: bool = True,
    ) -> AsyncIterator[HttpTeacher]:
        """Connect and fetch the teacher's identity; while the teacher starts, wait for it.

        Args:
            url: where the service is, like `http://127.0.0.1:8700`.
            name: the teacher's name there.
            api_key: sent as a bearer token; that of the variable `POTSTILL_API_KEY` when not given.
            timeout: seconds that one `score` call, with all its retries, may take.
            max_in_flight: requests under way at once, over all `score` calls.
            request_tokens: rows are sent in requests of at most this many tokens (one row is never split).
            retry: how to try again what may be tried again; `RetryPolicy()` when not given.
            store: False asks the service to answer straight from the teacher and to keep nothing.

        Raises:
            InvalidInput: a bad URL or number. UnknownTeacher: no such name there.
            Unavailable: nobody answers. DeadlineExceeded: not within `timeout`.
        """
        if request_tokens < 1:
            raise InvalidInput(f"request_tokens is {request_tokens}; it must be at least 1")
        async with Connection(
            url, api_key=api_key, timeout=timeout, max_in_flight=max_in_flight, retry=retry
        ) as connection:
            description = await connection.json(teacher_path(name))
            yield cls(connection, name, description, request_tokens=request_tokens, store=store)

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score rows; return one `Targets` per row, in order (see `potstill.cache.types.Teacher`).

        Raises:
            InvalidInput: a row is not a list of token ids.
            SpecMismatch: the service now has another teacher under this name.
            DeadlineExceeded: not within the timeout. Unavailable, Overloaded: still so after all retries.
            TeacherFailed: the answer does not fit the question. WireVersionError: the service speaks another version.
            PotstillError: any other refusal, as the class that the service named.
        """
        for index, row in enumerate(rows):
            _check_row(index, row)
        deadline = time.monotonic() + self._connection.timeout
        budget = min(self._request_tokens, max(1, _ANSWER_BYTES // want.bytes_per_position(self.identity.vocab_size)))
        batches = row_batches(row_starts([len(row) for row in rows]), budget, max_rows=_REQUEST_ROWS)
        requests = [asyncio.create_task(self._request(rows[start:stop], want, deadline)) for start, stop in batches]
        try:
            return [targets for answer in await asyncio.gather(*requests) for targets in answer]
        finally:
            # One that failed, or a cancelled caller, ends the others: no task outlives the call that made it.
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)

    async def _request(self, rows: Sequence[Tokens], want: Fields, deadline: float) -> list[Targets]:
        body = wire.request_to_arrow(wire.ScoreRequest(list(rows), want))
        headers = {"content-type": wire.ARROW_MEDIA_TYPE, "accept": wire.ARROW_MEDIA_TYPE}
        if not self._store:  # the service's cache then neither answers nor keeps
            headers["cache-control"] = "no-store"
        path = f"{teacher_path(self._name)}/score"
        tries = self._connection.tries(deadline - time.monotonic())
        reply = await self._connection.send(
            "POST", path, self._most_bytes(rows, want), tries=tries, headers=headers, content=body
        )
        try:
            answer = wire.answer_from_arrow(reply.content)
        except WireVersionError:
            raise
        except InvalidInput as error:
            raise TeacherFailed(f"{self._connection.url}{path} answered nonsense: {error.detail}") from error
        self._check(answer, rows, want)
        return answer.targets

    def _check(self, answer: wire.ScoreAnswer, rows: Sequence[Tokens], want: Fields) -> None:
        differences = self.identity.differences(answer.identity)
        if differences:
            raise SpecMismatch(f"teacher {self._name!r} at {self._connection.url} was exchanged: {differences}")
        who = f"teacher {self._name!r} at {self._connection.url}"
        if len(answer.targets) != len(rows):
            raise TeacherFailed(f"{who} answered {len(answer.targets)} rows for {len(rows)}")
        for row, targets in zip(rows, answer.targets, strict=True):
            if targets.num_positions != len(row):
                raise TeacherFailed(f"{who} answered {targets.num_positions} positions for a row of {len(row)} tokens")
            check_answer(targets, want, self.identity.vocab_size, who)

    def _most_bytes(self, rows: Sequence[Tokens], want: Fields) -> int:
        """Most bytes of the answer: what its targets take, and what Arrow puts around them."""
        num_positions = sum(map(len, rows))
        return num_positions * want.bytes_per_position(self.identity.vocab_size) + _ROW_BYTES * len(rows) + _HEAD_BYTES


def _check_row(index: int, row: Tokens) -> None:
    """Refuse values that would become other ids on their way as uint32: 1.5 would be 1, and -1 4294967295."""
    ids = np.asarray(row)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise InvalidInput(f"row {index} is {ids.dtype} of {ids.ndim} dimensions; it must be a list of token ids")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise InvalidInput(f"row {index} has ids from {ids.min()} to {ids.max()}; a token id is in [0, 2**32)")


def _table(description: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = description.get(key)
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    # JSON's true is an int to Python.
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


class SyncHttpTeacher:
    """An `HttpTeacher` for code without an event loop; any number of threads may call it at once.

    A context manager: `with SyncHttpTeacher(url, name) as teacher`. The arguments are those of `HttpTeacher.open`. An
    event loop runs in one background thread from entering to leaving; a forked child opens the teacher anew at its
    first call.
    """

    def __init__(self, url: str, name: str, **options: Any) -> None:
        self._open: Callable[[], _Running] = lambda: _Running(f"teacher {name}", HttpTeacher.open(url, name, **options))
        self._running: PerProcess[_Running] | None = None

    def __enter__(self) -> Self:
        """Connect; raises as `HttpTeacher.open` does."""
        self._running = PerProcess(self._open)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Disconnect; calls that other threads still wait for raise `Unavailable`."""
        running, self._running = self._opened(), None
        running.close()

    @property
    def identity(self) -> TeacherIdentity:
        """The identity that the service stated on opening."""
        return self._opened().teacher.identity

    @property
    def provenance(self) -> Provenance:
        """The provenance that the service stated on opening."""
        return self._opened().teacher.provenance

    @property
    def limits(self) -> TeacherLimits:
        """The limits that the service stated on opening."""
        return self._opened().teacher.limits

    def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score rows; arguments, result and errors as of `HttpTeacher.score`.

        Raises:
            Unavailable: not opened, or closed while waiting.
        """
        running = self._opened()
        return running.thread.run(running.teacher.score, rows, want)

    def _opened(self) -> _Running:
        if self._running is None:
            raise Unavailable("this teacher is not open; use it inside its with block")
        return self._running.get()


class _Running:
    """An open teacher, and the thread with the event loop that it lives on."""

    def __init__(self, name: str, opening: AbstractAsyncContextManager[HttpTeacher]) -> None:
        self._opening = opening
        self.thread = LoopThread(name, closed="this teacher was closed")
        try:
            self.teacher = self.thread.run(opening.__aenter__)
        except BaseException:
            self.thread.close(lambda: asyncio.sleep(0))
            raise

    def close(self) -> None:
        """Disconnect and end the thread."""
        self.thread.close(lambda: self._opening.__aexit__(None, None, None))


@asynccontextmanager
async def open_http_teacher(spec: str, *, options: Mapping[str, JSON] | None = None) -> AsyncIterator[HttpTeacher]:
    """Open a teacher by `URL#NAME`, or by `URL` where there is only one; the factory of `http://` and `https://`.

    The service is asked to keep nothing, because a caller that opens teachers by name keeps the targets itself.
    `options` may hold api_key or api_key_env, the name of a variable that has it (else `POTSTILL_API_KEY` is used; ""
    shows none), timeout, max_in_flight, request_tokens and attempts.

    Raises:
        InvalidInput: several teachers and no name, or an unknown or bad option.
    """
    url, _, name = spec.partition("#")
    arguments = _arguments(options or {})
    if not name:
        async with HttpAdmin.open(url, api_key=arguments.get("api_key")) as admin:
            names = [str(teacher.get("name")) for teacher in await admin.teachers()]
        if not names:
            raise InvalidInput(f"{url} has no teacher; name a service that has one")
        if len(names) != 1:
            raise InvalidInput(f"{url} has the teachers {', '.join(names)}: choose one, like {url}#{names[0]}")
        name = names[0]
    async with HttpTeacher.open(url, name, store=False, **arguments) as teacher:
        yield teacher


def _arguments(options: Mapping[str, JSON]) -> dict[str, Any]:
    kinds: dict[str, type | tuple[type, ...]] = {
        "api_key": str,
        "api_key_env": str,
        "timeout": (int, float),
        "max_in_flight": int,
        "request_tokens": int,
        "attempts": int,
    }
    for key, value in options.items():
        if key not in kinds:
            raise InvalidInput(f"unknown option {key!r} of an HTTP teacher; known are {', '.join(kinds)}")
        if isinstance(value, bool) or not isinstance(value, kinds[key]):
            # Errors are printed and logged; a key must not be.
            shown = "" if key == "api_key" else f" {value!r}"
            raise InvalidInput(f"option {key!r} of an HTTP teacher has a value{shown} of the wrong type")
    arguments: dict[str, Any] = {key: value for key, value in options.items() if key not in ("attempts", "api_key_env")}
    if "api_key_env" in options:
        arguments["api_key"] = _named_key(str(options["api_key_env"]))
    if "attempts" in options:
        arguments["retry"] = RetryPolicy(attempts=cast(int, options["attempts"]))
    return arguments


def _named_key(variable: str) -> str | None:
    # Whoever adds a teacher to a service chooses its URL, too: other secrets of the process are not to be had there.
    if not variable.startswith(API_KEY_VARIABLE):
        raise InvalidInput(f"option 'api_key_env' is {variable!r}; name a variable that begins with {API_KEY_VARIABLE}")
    return key_in(variable, "api_key_env")
