"""Committed targets behind a service, for a trainer that has no files.

`HttpCache` is opened where a `Cache` would be; its `HttpTargets` and `HttpCorpus` are read like a `TargetSet` and a
`Corpus`. Everything here blocks, and may be shared between threads. A read whose answer breaks off goes on where it
stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding import Encoding
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import InvalidInput, SpecMismatch, TeacherFailed, UnsupportedField
from potstill.cache.fields import COLUMNS
from potstill.cache.types import Fields, Targets
from potstill.cache.wanted import holders, wanted_fields
from potstill.cache.wire import StreamHead
from potstill.cache.wire.stream import write_row_numbers
from potstill.clients.answers import check_answer, described_identity, described_unshared
from potstill.clients.http_corpus import HttpCorpus, corpus_route, require_corpus
from potstill.clients.retry import RetryPolicy, Tries
from potstill.clients.sync_connection import BLOCK_BYTES, SyncConnection

# Our bounds of one request; the service states its own, and the smaller one counts.
_REQUEST_POSITIONS = 1 << 20
_REQUEST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class _Set:
    """One segment set of a target set: some of its fields, committed apart from the others."""

    fields: Fields
    encoding: Encoding
    committed: NDArray[np.bool_]


class HttpTargets:
    """One teacher's targets for one corpus over HTTP. May be shared between threads."""

    def __init__(
        self,
        connection: SyncConnection,
        teacher: str,
        corpus: HttpCorpus,
        *,
        top_k: bool = False,
        only: Fields | None = None,
    ) -> None:
        """Fetch identity, fields and encoding; with `top_k` or `only` of the segment sets with that, or these, alone.

        Raises:
            UnknownTeacher: there are no such targets. TeacherFailed: the service answers nonsense.
        """
        self.teacher = teacher
        self.corpus = corpus
        self._connection = connection
        self._top_k, self._only = top_k, only
        self._route = f"{corpus_route(corpus.name)}/targets/{quote(teacher, safe='')}"
        description = connection.json(self._route)
        self.identity = described_identity(description.get("identity"), teacher, connection.url)
        self.unshared = described_unshared(description.get("unshared_ids"), teacher, connection.url)
        sets = self._sets(description)
        self.fields = reduce(Fields.joined, (each.fields for each in sets))
        self.encoding = next((each for each in sets if each.fields.k), sets[0]).encoding
        limits = description.get("limits")
        self._limits = limits if isinstance(limits, dict) else {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address, which is asked again."""
        return partial(type(self), top_k=self._top_k, only=self._only), (self._connection, self.teacher, self.corpus)

    @property
    def committed(self) -> NDArray[np.bool_]:
        """[S] bool, true where a shard has a commit of every field. Sends a request."""
        sets = self._sets(self._connection.json(self._route))
        every: NDArray[np.bool_] = np.logical_and.reduce([each.committed for each in sets])
        return every

    def is_committed(self, shard: int) -> bool:
        """Tell if the shard has a commit of every field. Sends a request."""
        return bool(self.committed[shard])

    def top_k_only(self) -> HttpTargets:
        """The targets without their other fields; a shard is committed then as soon as its top-k is.

        Raises:
            UnsupportedField: there is no top-k.
        """
        return HttpTargets(self._connection, self.teacher, self.corpus, top_k=True)

    def only(self, fields: Fields) -> HttpTargets:
        """Reduce to the segment sets that hold these fields; as `TargetSet.only`. Sends a request."""
        return HttpTargets(self._connection, self.teacher, self.corpus, only=self._wanted(None, fields))

    def read(self, start: int, stop: int, *, k: int | None = None, fields: Fields | None = None) -> Targets:
        """Read the targets of positions `start` to `stop`; arguments and errors as of `TargetSet.read`.

        Raises:
            SpecMismatch: the service has another teacher or corpus under the name now.
            Unavailable, Overloaded, DeadlineExceeded: still so after all retries.
            TeacherFailed: the service answers nonsense. WireVersionError: it speaks another version.
        """
        return Targets.concat(list(self.stream(start, stop, k=k, fields=fields)))

    def stream(self, start: int, stop: int, *, k: int | None = None, fields: Fields | None = None) -> Iterator[Targets]:
        """Read like `read`, but yield blocks of a few MiB, so that a range of any size is never held whole."""
        self.corpus.require_positions(start, stop)
        want, most = self._wanted(k, fields), self._most("max_stream_positions", _REQUEST_POSITIONS)
        return self._connection.parts(
            lambda at, tries: self._range(start + at, min(stop, start + at + most), want, tries),
            stop - start,
            lambda targets: targets.num_positions,
        )

    def read_rows(self, rows: Sequence[int], *, k: int | None = None, fields: Fields | None = None) -> list[Targets]:
        """Read one `Targets` per row index, in order; arguments and errors as of `read`."""
        want = self._wanted(k, fields)
        most = self._most("max_stream_positions", _REQUEST_POSITIONS) // self.corpus.spec.longest_row
        most = max(1, min(self._most("max_rows", _REQUEST_ROWS), most))
        read = self._connection.parts(lambda at, tries: self._rows(rows[at : at + most], want, tries), len(rows))
        return list(read) if len(rows) else []

    def read_column(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read one of `potstill.cache.fields.COLUMNS`, float32 [P]; errors as of `TargetSet.read_column`."""
        want = self.fields.only([COLUMNS[name]]) if name in COLUMNS else None
        if want is None:
            raise UnsupportedField(
                f"{name!r} is not a column of teacher {self.teacher!r}'s targets for corpus {self.corpus.name!r}"
            )
        if start == stop:
            return np.empty(0, np.float32)
        return np.concatenate([getattr(part, name) for part in self.stream(start, stop, fields=want)])

    def _range(self, start: int, stop: int, want: Fields, tries: Tries) -> Iterator[Targets]:
        names = [each.name for each in want.beside_top_k]
        # `k` asks for the top-k by itself; it is named only where the list would be empty, which means no field at all.
        params = {"start": start, "stop": stop, "k": want.k, "fields": ",".join(names or ["top_k"])}
        most_bytes = self._most_bytes(want, 1)
        with self._connection.stream(self._route, tries=tries, params=params, most_bytes=most_bytes) as reader:
            self._check_head(reader.head, want)
            if reader.head.length != stop - start:
                raise TeacherFailed(f"{self._who} promised {reader.head.length} positions for {start} to {stop}")
            for targets in reader.targets():
                yield self._checked(targets, want)

    def _rows(self, rows: Sequence[int], want: Fields, tries: Tries) -> Iterator[Targets]:
        lengths = np.diff(self.corpus.row_ranges(rows), axis=1)[:, 0].tolist()
        body, most_bytes = write_row_numbers(rows, want), self._most_bytes(want, max(lengths))
        with self._connection.stream(f"{self._route}/rows", tries=tries, body=body, most_bytes=most_bytes) as reader:
            self._check_head(reader.head, want)
            if reader.head.batches != len(rows):
                raise TeacherFailed(f"{self._who} promised {reader.head.batches} rows for {len(rows)}")
            for length, targets in zip(lengths, reader.targets(), strict=True):
                if targets.num_positions != length:
                    raise TeacherFailed(
                        f"{self._who} gave {targets.num_positions} targets for a row of {length} tokens"
                    )
                yield self._checked(targets, want)

    @property
    def _who(self) -> str:
        return f"teacher {self.teacher!r} on corpus {self.corpus.name!r} at {self._connection.url}"

    def _check_head(self, head: StreamHead, want: Fields) -> None:
        require_corpus(head, self.corpus.fingerprint, self._connection.url)
        # A service may be restarted with another teacher of this name in the middle of a long read.
        differences = "no identity" if head.identity is None else self.identity.differences(head.identity)
        if differences:
            raise SpecMismatch(f"{self._who} was exchanged: {differences}")
        if head.fields != want:
            raise TeacherFailed(f"{self._who} answered {head.fields}, not {want}")

    def _checked(self, targets: Targets, want: Fields) -> Targets:
        check_answer(targets, want, self.identity.vocab_size, self._who)
        return targets

    def _most_bytes(self, want: Fields, num_positions: int) -> int:
        """Most bytes of a record batch: a block, or so many positions where those are more."""
        return max(BLOCK_BYTES, 2 * num_positions * want.bytes_per_position(self.identity.vocab_size))

    def _wanted(self, k: int | None, fields: Fields | None) -> Fields:
        return wanted_fields(self.fields, k, fields, f"teacher {self.teacher!r} on corpus {self.corpus.name!r}")

    def _most(self, limit: str, ours: int) -> int:
        theirs = self._limits.get(limit)
        return min(ours, theirs) if type(theirs) is int and theirs > 0 else ours

    def _sets(self, description: dict[str, Any]) -> list[_Set]:
        try:
            sets = [
                _Set(
                    Fields.from_json(each["fields"]),
                    encoding_by_name(each["encoding"]["name"]),
                    _committed(each["committed"], self.corpus.num_shards),
                )
                for each in description["sets"]
            ]
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise TeacherFailed(
                f"{self._connection.url} describes teacher {self.teacher!r} badly: {error!r}"
            ) from error
        chosen = [each for each in sets if each.fields.k or not self._top_k]
        if not chosen:
            raise UnsupportedField(
                f"teacher {self.teacher!r} has no top-k for corpus {self.corpus.name!r}; run `potstill prefill` for it"
            )
        if self._only is None:
            return chosen
        return [chosen[i] for i, _ in holders([each.fields for each in chosen], self._only)]


class HttpCache(AbstractContextManager["HttpCache"]):
    """The corpora and committed targets of a service, opened where a `Cache` would be. A context manager."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 600.0, retry: RetryPolicy | None = None
    ) -> None:
        """Nothing is sent yet; see `potstill.clients.sync_connection.SyncConnection`."""
        self._connection = SyncConnection(url, api_key=api_key, timeout=timeout, retry=retry)
        self._corpora: dict[str, HttpCorpus] = {}

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Disconnect; a thread that still reads raises `Unavailable`."""
        self._connection.close()

    def corpora(self) -> list[str]:
        """Fetch the names of the corpora."""
        found = self._connection.json("/v1/corpora").get("corpora")
        return [str(corpus.get("name")) for corpus in found or [] if isinstance(corpus, dict)]

    def corpus(self, name: str) -> HttpCorpus:
        """Open a corpus by name, once: a sealed corpus never changes.

        Raises:
            UnknownCorpus: there is none of this name. PotstillError: as `SyncConnection.json`.
        """
        if name not in self._corpora:
            self._corpora[name] = HttpCorpus(self._connection, name)
        return self._corpora[name]

    def teachers(self, corpus: str) -> list[str]:
        """Fetch the names of the teachers that have targets for a corpus, complete or not."""
        found = self._connection.json(corpus_route(corpus)).get("teachers")
        return list(found) if isinstance(found, dict) else []

    def targets(self, teacher: str, corpus: str) -> HttpTargets:
        """Open a teacher's targets for a corpus.

        Raises:
            UnknownCorpus, UnknownTeacher: there are none of this name. PotstillError: as `SyncConnection.json`.
        """
        return HttpTargets(self._connection, teacher, self.corpus(corpus))


def _committed(runs: Any, num_shards: int) -> NDArray[np.bool_]:
    done, at = np.zeros(num_shards, dtype=bool), 0
    for first, stop in runs:
        if not at <= first < stop <= num_shards:
            raise ValueError(f"shards {first} to {stop} of {num_shards}, after those to {at}")
        done[first:stop] = True
        at = stop
    return done
