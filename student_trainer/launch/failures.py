"""Errors of ours that end a run on Ray.

They stand by themselves, as Ray's controller loads this module: with what trains it took twice as long to start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.train

from potstill.cache.errors import PotstillError
from potstill.clients.patience import has_no_answer


class EndOnOurErrors(ray.train.UserCallback):  # type: ignore[misc]
    """Ends the run where a worker raises an error that a restart cannot mend; Ray would start it again and again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:  # noqa: ARG002 -- Ray's
        """Raise the first such error: in Ray's controller it ends the run, as only those of workers are tried again."""
        for error in map(error_of_ours, worker_exceptions.values()):
            if error is not None and not has_no_answer(error):
                raise error


def error_of_ours(failure: BaseException | None) -> PotstillError | None:
    """Find the error of ours that a worker raised, or that ended the run; None if it was another."""
    cause = getattr(failure, "cause", None) or getattr(failure, "__cause__", None) or failure
    return cause if isinstance(cause, PotstillError) else None
