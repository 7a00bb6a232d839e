"""`/v1/corpora/{corpus}/...`: a corpus's own arrays, for a trainer that has no access to the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypeVar

from fastapi import FastAPI, Query, Request, Response
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.annotations import open_annotation, read_annotation
from potstill.cache.corpus.keys import KEY_BYTES
from potstill.cache.errors import InvalidInput
from potstill.cache.types import JSON
from potstill.cache.wire import StreamHead, scores as wire
from potstill.cache.wire.stream import in_pieces, read_row_numbers, write_array
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.admission.limits import read_body, request_format
from potstill.teacher_service.routes.corpora.bodies import get_and_head, rows_from_json
from potstill.teacher_service.routes.corpora.opened_sets import OpenedSets
from potstill.teacher_service.routes.corpora.reads import HELD_BLOCKS, require_at_most
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport import StreamedAnswer
from potstill.teacher_service.transport.bounded_transfers import held_until_answered
from potstill.teacher_service.transport.headers import immutable_headers, not_modified, strong_etag
from potstill.teacher_service.transport.streamed import ReadSlots

_PART = 1 << 17
"""Elements of a record batch, which then holds 0.5 to 2 MiB."""
_ROWS_BYTES = 1 << 20  # in which rows are sent together
_MOST_ELEMENTS = 1 << 40  # beyond any corpus, and far enough from the end of int64 for every product
T = TypeVar("T")
Read: TypeAlias = Callable[[int, int], NDArray[Any]]
"""Reads elements from one to another."""
Start: TypeAlias = Annotated[int, Query(ge=0, lt=_MOST_ELEMENTS)]
Stop: TypeAlias = Annotated[int | None, Query(ge=0, lt=_MOST_ELEMENTS)]


@dataclass(frozen=True, slots=True)
class Array:
    """An array of a corpus: its length, a function that reads a range, and its version within the corpus."""

    length: int
    read: Read
    version: JSON = None
    item_bytes: int = 8
    """Most bytes of an element."""


_ARRAYS: dict[str, Callable[[Corpus], Array]] = {
    "tokens": lambda corpus: Array(corpus.num_positions, corpus.tokens),
    # `starts` reads those of rows and the end of the last one: an element more than rows.
    "rows": lambda corpus: Array(len(corpus) + 1, lambda start, stop: corpus.starts(start, stop - 1)),
    "row_keys": lambda corpus: Array(len(corpus), corpus.row_keys, item_bytes=KEY_BYTES),
    "shard_rows": lambda corpus: Array(corpus.num_shards + 1, lambda start, stop: corpus.shard_rows[start:stop]),
    "shard_starts": lambda corpus: Array(corpus.num_shards + 1, lambda start, stop: corpus.shard_starts[start:stop]),
    # Only of a corpus that says: the superset of another needs all its rows, which a client may count itself.
    "document_rows": lambda corpus: Array((corpus.spec.num_documents or 0) + 1, corpus.document_starts),
    "loss_mask": lambda corpus: Array(corpus.num_positions, corpus.loss_mask, item_bytes=1),
}
"""Arrays by the last part of their route."""


@dataclass(frozen=True, slots=True)
class Text:
    """A JSON text of a corpus: a function that reads it in pieces, and its version within the corpus."""

    pieces: Callable[[], Iterator[bytes]]
    version: JSON


_TEXTS: dict[str, Callable[[Corpus], Text]] = {
    "tokenizer": lambda corpus: Text(corpus.tokenizer_text, "tokenizer_json"),
    "tokenizer_files": lambda corpus: Text(
        corpus.tokenizer_files_text, ["tokenizer_files", *corpus.tokenizer_files_objects]
    ),
}
"""Texts by the last part of their route."""
_OF_ROWS: dict[str, Callable[[Corpus], Read]] = {
    "rows": lambda corpus: corpus.tokens,
    "loss_mask": lambda corpus: corpus.loss_mask,
}
"""Values at the positions of rows, by the last part of the route that takes the numbers of rows."""


@dataclass(frozen=True, slots=True)
class CorpusReading:
    """The parts that the corpus routes share: the open corpora, the threads that read them, and the limits."""

    opened: OpenedSets
    slots: ReadSlots
    limits: LimitSettings
    admission: Admission

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run a blocking call in one of the threads that read the store, once it is the caller's turn.

        Raises:
            Overloaded: very many calls of the caller wait already. What the call raises.
        """
        self.slots.threads.require_room()
        return await self.slots.threads.run(call)

    async def answer(
        self, request: Request, find: Callable[[], tuple[str, Array]], start: int, stop: int | None
    ) -> Response:
        """Stream a range of the array that `find` gives with the corpus's fingerprint.

        Raises:
            InvalidInput: not a range of the array. What `find` raises.
        """

        def planned() -> tuple[Iterator[bytes], str, int]:
            fingerprint, array = find()
            end = array.length if stop is None else stop
            if not 0 <= start < end <= array.length:
                raise InvalidInput(f"start={start} and stop={end} are not a range of {array.length}; give start < stop")
            # A deleted annotation may be made again under its name: its version tells the two apart.
            etag = strong_etag(wire.ARROW_MEDIA_TYPE, fingerprint, request.scope["path"], array.version, start, end)
            held = HELD_BLOCKS * min(end - start, _PART) * array.item_bytes
            return _pieces(fingerprint, array, start, end), etag, held

        pieces, etag, held = await self.in_thread(planned)
        unchanged = not_modified(request, etag)
        if unchanged is not None:
            return unchanged
        return self.streamed(request, pieces, held, immutable_headers(etag))

    def streamed(
        self,
        request: Request,
        pieces: Iterator[bytes],
        held_bytes: int,
        headers: Mapping[str, str],
        media_type: str = wire.ARROW_MEDIA_TYPE,
    ) -> Response:
        """Stream pieces that hold so many bytes at a time; raises Overloaded where there is no room for them."""
        held_until_answered(request).enter_context(self.admission.answer(held_bytes))
        return StreamedAnswer(pieces, self.slots, headers=headers, media_type=media_type)


def add_array_routes(app: FastAPI, reading: CorpusReading, dependencies: Sequence[Any]) -> None:
    """Add the routes to the app."""
    for name in _ARRAYS:
        _add_array_route(app, reading, dependencies, name)
    for name, of in _OF_ROWS.items():
        _add_rows_route(app, reading, dependencies, name, of)
    for name, text in _TEXTS.items():
        _add_text_route(app, reading, dependencies, name, text)

    @get_and_head(app, "/v1/corpora/{corpus}/annotations/{name}", dependencies)
    async def read_annotation_values(
        corpus: str, name: str, request: Request, start: Start = 0, stop: Stop = None
    ) -> Response:
        """Read a range of an annotation's values, one a row."""
        return await reading.answer(request, lambda: _annotation(reading.opened, corpus, name), start, stop)


def _add_rows_route(
    app: FastAPI, reading: CorpusReading, dependencies: Sequence[Any], name: str, values: Callable[[Corpus], Read]
) -> None:
    @app.post(f"/v1/corpora/{{corpus}}/{name}", dependencies=dependencies)
    async def take_rows(corpus: str, request: Request) -> Response:
        """Read the tokens, or the loss mask, of any rows, by their numbers."""
        reads = request_format(request)
        body = await read_body(request)

        def read() -> tuple[Iterator[bytes], int]:
            most = reading.limits.max_rows
            is_json = reads == wire.JSON_MEDIA_TYPE
            rows = rows_from_json(body, most)[0] if is_json else read_row_numbers(body, max_rows=most)[0]
            require_at_most(len(rows), most, "rows", "max_rows")
            of = reading.opened.corpus(corpus)
            pieces = _row_pieces(of, rows, values(of), reading.limits)
            return pieces, HELD_BLOCKS * (_ROWS_BYTES + 8 * of.spec.longest_row)

        pieces, held = await reading.in_thread(read)
        return reading.streamed(request, pieces, held, {"cache-control": "no-store"})


def _add_array_route(app: FastAPI, reading: CorpusReading, dependencies: Sequence[Any], name: str) -> None:
    path = f"/v1/corpora/{{corpus}}/{name}"

    @get_and_head(app, path, dependencies)
    async def read_array(corpus: str, request: Request, start: Start = 0, stop: Stop = None) -> Response:
        """Read a range of one of the corpus's arrays.

        They are `tokens` [P], `rows` [R+1] (where each row starts, and the end), `row_keys` [R, 16], `shard_rows` and
        `shard_starts` [S+1], `document_rows` [D+1], and `loss_mask` [P].
        """

        def find() -> tuple[str, Array]:
            of = reading.opened.corpus(corpus)
            return of.fingerprint, _ARRAYS[name](of)

        return await reading.answer(request, find, start, stop)


def _add_text_route(
    app: FastAPI, reading: CorpusReading, dependencies: Sequence[Any], name: str, text: Callable[[Corpus], Text]
) -> None:
    @get_and_head(app, f"/v1/corpora/{{corpus}}/{name}", dependencies)
    async def read_text(corpus: str, request: Request) -> Response:
        """Give the corpus's tokenizer as `tokenizers` saves it, or the texts of the files beside it, by name."""
        of = await reading.in_thread(lambda: reading.opened.corpus(corpus))
        sealed = text(of)
        etag = strong_etag(wire.JSON_MEDIA_TYPE, of.fingerprint, sealed.version)
        unchanged = not_modified(request, etag)
        if unchanged is not None:
            return unchanged
        headers = {**immutable_headers(etag), wire.FORMAT_HEADER: wire.WIRE_VERSION}
        held = HELD_BLOCKS * (1 << 20)  # more than the pieces, as the store is read in MiBs
        return reading.streamed(request, sealed.pieces(), held, headers, wire.JSON_MEDIA_TYPE)


def _annotation(opened: OpenedSets, corpus: str, name: str) -> tuple[str, Array]:
    of, root = opened.corpus(corpus), opened.root
    found = open_annotation(root, of.annotated, name)

    def read(start: int, stop: int) -> NDArray[Any]:
        return read_annotation(root, of.annotated, name, start, stop)

    return of.fingerprint, Array(found.num_rows, read, [found.group, *(item.sha256 for item in found.objects)])


def _pieces(fingerprint: str, array: Array, start: int, stop: int) -> Iterator[bytes]:
    cuts = range(start, stop, _PART)
    head = StreamHead(batches=len(cuts), length=stop - start, corpus=fingerprint)
    return write_array(head, (array.read(at, min(at + _PART, stop)) for at in cuts))


def _row_pieces(corpus: Corpus, rows: Sequence[int], values: Read, limits: LimitSettings) -> Iterator[bytes]:
    """Stream one record batch of the values at a row's positions per row."""
    if not rows:
        raise InvalidInput("rows is empty; ask for at least one")
    ranges = corpus.row_ranges(rows)
    length = int((ranges[:, 1] - ranges[:, 0]).sum())
    require_at_most(length, limits.max_stream_positions, "positions", "max_stream_positions")
    head = StreamHead(batches=len(rows), length=length, corpus=corpus.fingerprint)
    return in_pieces(write_array(head, (values(start, stop) for start, stop in ranges.tolist())), _ROWS_BYTES)
