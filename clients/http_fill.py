"""Jobs of a service that fill a corpus: start one, look at it, stop it."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from potstill.cache.types import JSON, Fields
from potstill.clients.http_corpus import corpus_route
from potstill.clients.sync_connection import SyncConnection


class HttpFill:
    """The job of one corpus and one teacher."""

    def __init__(self, connection: SyncConnection, corpus: str, teacher: str) -> None:
        self._connection = connection
        self._route = f"{corpus_route(corpus)}/fill/{quote(teacher, safe='')}"

    def start(self, fields: Fields, encoding: str, **plan: JSON) -> dict[str, Any]:
        """Start the job, or find it there already; return its state. `plan` may hold batch_tokens and in_flight.

        Raises:
            AlreadyExists: another job for the two runs or waits.
            UnknownTeacher, UnknownCorpus, SpecMismatch, LimitExceeded, Forbidden: refused; nothing was started.
        """
        body = {"fields": fields.to_json(), "encoding": encoding, **plan}
        return self._connection.json(self._route, method="PUT", body=body)

    def status(self) -> dict[str, Any]:
        """Fetch `state` (waiting, running, done, failed, stopped), shards, positions, rate and error.

        Raises:
            NotFound: no job was started since the service was.
        """
        return self._connection.json(self._route)

    def stop(self) -> dict[str, Any]:
        """Stop the job if it runs or waits; committed shards stay.

        Raises:
            NotFound: no job was started since the service was.
        """
        return self._connection.json(self._route, method="DELETE")
