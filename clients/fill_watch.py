"""A job that fills a corpus, watched over its whole life, also while its service does not answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from potstill.cache.errors import NotFound
from potstill.cache.types import JSON, Fields
from potstill.clients.http_corpus import corpus_route
from potstill.clients.patience import Patience
from potstill.clients.sync_connection import SyncConnection


@dataclass(frozen=True, slots=True)
class FillWatch:
    """Starts, watches and stops the job of one corpus and one teacher; each call tries until there is an answer.

    Raises:
        Unavailable: by any call, if there was no answer for as long as `patience`.
        PotstillError: by any call, any other refusal.
    """

    connection: SyncConnection
    """Connection that asks once a call (`RetryPolicy(attempts=1)`): trying again is done here."""
    corpus: str
    teacher: str
    patience: Patience
    """With a service that does not answer."""
    again: str
    """The command that starts the job or goes on with it, for messages."""

    @property
    def _route(self) -> str:
        return f"{corpus_route(self.corpus)}/fill/{quote(self.teacher, safe='')}"

    def look(self) -> dict[str, Any]:
        """Fetch `state` (waiting, running, done, failed, stopped), shards, positions, rate and error.

        Raises:
            NotFound: the service was started anew, which ended the job.
        """
        way_on = f"The job may go on there: `{self.again}` watches it, or goes on with the rest after a restart"
        try:
            return self.patience.answer(lambda: self.connection.json(self._route), way_on)
        except NotFound as error:
            raise NotFound(
                "the service was restarted, which ended the fill: a restarted service does not go on by itself. "
                f"What is committed stays; `{self.again}` goes on with the rest"
            ) from error

    def start(self, fields: Fields, encoding: str) -> dict[str, Any]:
        """Start the job, or find it there already; return its state.

        Raises:
            AlreadyExists: another job for the two runs or waits.
            UnknownTeacher, UnknownCorpus, SpecMismatch, LimitExceeded, Forbidden: refused; nothing was started.
        """
        body: JSON = {"fields": fields.to_json(), "encoding": encoding}
        way_on = f"Whether it began is not known: `{self.again}` starts it, or watches it"
        return self.patience.answer(lambda: self.connection.json(self._route, method="PUT", body=body), way_on)

    def stop(self) -> dict[str, Any]:
        """Stop the job if it runs or waits; committed shards stay.

        Raises:
            NotFound: no job was started since the service was.
        """
        way_on = "The job may go on there: the same command tries to stop it again"
        return self.patience.answer(lambda: self.connection.json(self._route, method="DELETE"), way_on)
