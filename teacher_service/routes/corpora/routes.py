"""`/v1/corpora`: corpora and their committed targets, read over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse

from potstill.cache.errors import InvalidInput
from potstill.cache.wanted import named_fields, wanted_fields
from potstill.cache.wire import scores as wire
from potstill.cache.wire.stream import read_row_numbers
from potstill.teacher_service.access import Role, allow
from potstill.teacher_service.admission.limits import answer_format, read_body, request_format, same_wire
from potstill.teacher_service.hosting import Service
from potstill.teacher_service.routes.corpora.arrays import CorpusReading, add_array_routes
from potstill.teacher_service.routes.corpora.bodies import get_and_head, known_parameters, rows_from_json
from potstill.teacher_service.routes.corpora.description import describe_corpora, describe_corpus, describe_targets
from potstill.teacher_service.routes.corpora.listing import Listing
from potstill.teacher_service.routes.corpora.opened_sets import OpenedSets
from potstill.teacher_service.routes.corpora.reads import (
    RangeRead,
    RowsRead,
    num_bytes,
    require_at_most,
    require_within,
)
from potstill.teacher_service.routes.corpora.targets_json import json_pieces
from potstill.teacher_service.routes.fills import add_fill_routes
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport import StreamedAnswer
from potstill.teacher_service.transport.headers import immutable_headers, not_modified
from potstill.teacher_service.transport.streamed import ReadSlots

_THREADS = 4  # a pool of their own: reads of a slow store must not keep threads from score requests
_TARGETS = "/v1/corpora/{corpus}/targets/{teacher}"


def add_corpus_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""
    opened = OpenedSets(service.cache, service.identity_of)
    limits = service.limits
    slots = ReadSlots(threads=_THREADS, streams=limits.max_streams, stall_seconds=limits.stall_seconds)
    reading = CorpusReading(opened, slots, limits, service.admission)
    trainers = [Depends(allow(Role.TRAINER)), Depends(same_wire), Depends(known_parameters)]

    listing = Listing(slots.threads, lambda: describe_corpora(opened))

    @app.get("/v1/corpora", dependencies=trainers)
    async def list_corpora() -> Response:
        """List the corpora of the cache, and those that cannot be read; of hundreds it may be half a minute old."""
        return Response(await listing.latest(), media_type=wire.JSON_MEDIA_TYPE)

    @app.get("/v1/corpora/{corpus}", dependencies=trainers)
    async def one_corpus(corpus: str) -> dict[str, Any]:
        """Describe a corpus, and which teachers have targets for it."""
        return await reading.in_thread(lambda: describe_corpus(opened, corpus))

    _add_target_routes(app, reading, trainers)
    add_array_routes(app, reading, trainers)
    add_fill_routes(app, service)


def _add_target_routes(app: FastAPI, reading: CorpusReading, trainers: list[Any]) -> None:
    opened, limits = reading.opened, reading.limits

    @get_and_head(app, _TARGETS, trainers)
    async def read_targets(
        corpus: str,
        teacher: str,
        request: Request,
        start: Annotated[int | None, Query(ge=0)] = None,
        stop: Annotated[int | None, Query(ge=0)] = None,
        k: Annotated[int | None, Query(ge=0)] = None,
        fields: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        """Read the targets of a range of positions; without `start` and `stop`, describe the target set.

        `fields` names what to read, with commas between (all by default), `k` how many entries of the top-k. The answer
        is immutable, with a strong ETag.
        """
        if start is None and stop is None:
            described = await reading.in_thread(lambda: describe_targets(opened.targets(teacher, corpus), limits))
            return JSONResponse(described, headers={"cache-control": "no-cache"})  # commits are added all the time
        if start is None or stop is None or stop <= start:
            raise InvalidInput(f"start={start} and stop={stop} are not a range; give start < stop, or neither")
        names = None if fields is None else fields.split(",")

        def plan() -> RangeRead:
            targets = opened.targets(teacher, corpus)
            want = named_fields(targets.fields, names, k, f"teacher {teacher!r} on corpus {corpus!r}")
            return RangeRead(targets, start, stop, want)

        return await _answer_range(request, reading, plan)

    @app.post(f"{_TARGETS}/rows", dependencies=trainers)
    async def read_rows(corpus: str, teacher: str, request: Request) -> Response:
        """Read the targets of any rows, by their numbers."""
        reads = request_format(request)
        writes = answer_format(request, wire.ARROW_MEDIA_TYPE)
        # A POST may not be cached, and any rows in any order make too many answers for an ETag to be of use.
        body = await read_body(request)
        read = await reading.in_thread(lambda: _rows(opened, (corpus, teacher), body, reads, limits))
        require_within(read, limits, as_json=writes == wire.JSON_MEDIA_TYPE)
        return _streamed(request, read, writes, reading, {"cache-control": "no-store"})


async def _answer_range(request: Request, reading: CorpusReading, plan: Callable[[], RangeRead]) -> Response:
    writes = answer_format(request, wire.ARROW_MEDIA_TYPE)

    def planned() -> tuple[RangeRead, str]:
        read = plan()
        require_within(read, reading.limits, as_json=writes == wire.JSON_MEDIA_TYPE)
        return read, read.etag(read.require_committed(), writes)

    read, etag = await reading.in_thread(planned)
    unchanged = not_modified(request, etag)
    if unchanged is not None:
        return unchanged
    headers = immutable_headers(etag)
    # Answered after all checks, so that HEAD tells whether the range is committed, and its ETag.
    if request.method == "HEAD":
        return StreamedAnswer(iter(()), reading.slots, headers=headers, media_type=writes)
    return _streamed(request, read, writes, reading, headers)


def _streamed(
    request: Request,
    read: RangeRead | RowsRead,
    writes: str,
    reading: CorpusReading,
    headers: Mapping[str, str],
) -> Response:
    # JSON is written from the arrays of the whole answer, which are held until it is sent.
    as_json = writes == wire.JSON_MEDIA_TYPE
    size = num_bytes(read) if as_json else read.held_bytes
    pieces = json_pieces(read.targets.identity, read.read) if as_json else read.pieces()
    pieces = reading.opened.watched(read.targets, pieces)
    return reading.streamed(request, pieces, size, headers, writes)


def _rows(opened: OpenedSets, names: tuple[str, str], body: bytes, reads: str, limits: LimitSettings) -> RowsRead:
    corpus, teacher = names
    targets = opened.targets(teacher, corpus)
    who = f"teacher {teacher!r} on corpus {corpus!r}"
    if reads == wire.JSON_MEDIA_TYPE:
        rows, chosen, k = rows_from_json(body, limits.max_rows)
        want = named_fields(targets.fields, chosen, k, who)
    else:
        rows, fields = read_row_numbers(body, max_rows=limits.max_rows)
        want = wanted_fields(targets.fields, None, fields, who)
    require_at_most(len(rows), limits.max_rows, "rows", "max_rows")
    return RowsRead.of(targets, rows, want)
