"""A job that fills a corpus, watched over its whole life, also while its service does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from potstill.cache.errors import NotFound, PotstillError, Unavailable
from potstill.cache.types import JSON, Fields
from potstill.clients.http_corpus import corpus_route
from potstill.clients.retry import RetryPolicy
from potstill.clients.sync_connection import SyncConnection


class FillWatch:
    """Starts, watches and stops the job of one corpus and one teacher; each call tries until there is an answer.

    Args:
        connection: asks once a call (`RetryPolicy(attempts=1)`): trying again is done here.
        corpus: name of a corpus of the service's cache.
        teacher: the teacher's name on the service.
        patience: seconds without an answer after which the job is given up.
        again: the command that starts the job or goes on with it, for messages.
        tell: gets a line when the service does not answer for now, and another when it does again.
        retry: waits between two tries.

    Raises:
        Unavailable: by any call, if there was no answer for as long as `patience`.
        PotstillError: by any call, any other refusal.
    """

    def __init__(
        self,
        connection: SyncConnection,
        corpus: str,
        teacher: str,
        *,
        patience: float,
        again: str,
        tell: Callable[[str], None],
        retry: RetryPolicy | None = None,
    ) -> None:
        self._connection = connection
        self._route = f"{corpus_route(corpus)}/fill/{quote(teacher, safe='')}"
        self._patience = patience
        self._again = again
        self._tell = tell
        self._retry = retry or RetryPolicy()

    def look(self) -> dict[str, Any]:
        """Fetch `state` (waiting, running, done, failed, stopped), shards, positions, rate and error.

        Raises:
            NotFound: the service was started anew, which ended the job.
        """
        way_on = f"The job may go on there: `{self._again}` watches it, or goes on with the rest after a restart"
        try:
            return self._answer(lambda: self._connection.json(self._route), way_on)
        except NotFound as error:
            raise NotFound(
                "the service was restarted, which ended the fill: a restarted service does not go on by itself. "
                f"What is committed stays; `{self._again}` goes on with the rest"
            ) from error

    def start(self, fields: Fields, encoding: str) -> dict[str, Any]:
        """Start the job, or find it there already; return its state.

        Raises:
            AlreadyExists: another job for the two runs or waits.
            UnknownTeacher, UnknownCorpus, SpecMismatch, LimitExceeded, Forbidden: refused; nothing was started.
        """
        body: JSON = {"fields": fields.to_json(), "encoding": encoding}
        way_on = f"Whether it began is not known: `{self._again}` starts it, or watches it"
        return self._answer(lambda: self._connection.json(self._route, method="PUT", body=body), way_on)

    def stop(self) -> dict[str, Any]:
        """Stop the job if it runs or waits; committed shards stay.

        Raises:
            NotFound: no job was started since the service was.
        """
        way_on = "The job may go on there: the same command tries to stop it again"
        return self._answer(lambda: self._connection.json(self._route, method="DELETE"), way_on)

    def _answer(self, ask: Callable[[], dict[str, Any]], way_on: str) -> dict[str, Any]:
        begin = time.monotonic()
        failures = 0
        while True:
            try:
                at = ask()
            except PotstillError as error:
                if not error.retryable:
                    raise
                failures += 1
                self._wait(error, failures, begin, way_on)
            else:
                if failures:
                    self._tell("the service answers again")
                return at

    def _wait(self, error: PotstillError, failures: int, begin: float, way_on: str) -> None:
        left = begin + self._patience - time.monotonic()
        if left <= 0:
            raise Unavailable(f"no answer for {self._patience:g} s ({error.detail}). {way_on}") from error
        if failures == 1:
            self._tell(f"no answer for now ({error.detail}); trying again for up to {self._patience:g} s")
        # At most what is left, so that one last try is made at the very end of the patience.
        time.sleep(min(left, self._retry.wait_seconds(failures, error.retry_after)))
