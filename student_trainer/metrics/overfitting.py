"""Signs that a student learns its rows by heart: the gap to held-out rows, and what repeated rows still give."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from statistics import fmean

from potstill.student_trainer.metrics.records import Record

_LOG = logging.getLogger(__name__)
_RISES = 3
"""Evaluations in a row over the best one, after which it is no noise of the rows between two of them."""


class OverfittingWatch:
    """Follows the records of a run; adds to each evaluation what training itself reached since the one before.

    All that it knows comes from records, so a run that is stopped and goes on writes what a straight one does.
    """

    def __init__(self, earlier: Iterable[Record] = ()) -> None:
        """Start behind the records of earlier sessions."""
        self._losses: list[float] = []
        self._epoch = 0
        self._best: tuple[float, int] | None = None  # held-out cross-entropy and its step
        self._rises = 0
        for record in earlier:
            self._see(record)

    def follow(self, record: Record) -> Record:
        """Take the next record; give it back, an evaluation of held-out rows with `train_ce` and `gap`.

        `train_ce` is the mean cross-entropy of the steps since the evaluation before, in nats per label, and `gap` how
        much higher it is on the held-out rows.
        """
        train = fmean(self._losses) if self._losses else None
        self._see(record)
        held_out = _held_out_ce(record)
        if held_out is None:
            return record
        if self._rises == _RISES and self._best is not None:
            _LOG.warning(
                "held-out cross-entropy was %.4f at step %d, and higher in the %d evaluations since, while rows come "
                "again (epoch %d): the student learns them by heart; take fewer train.steps, or more text",
                *self._best,
                _RISES,
                self._epoch,
            )
        if train is None:
            return record
        return {**record, "train_ce": round(train, 6), "gap": round(held_out - train, 6)}

    def _see(self, record: Record) -> None:
        if "rollback" in record:
            return
        if "loss" in record:
            self._losses.append(record["ce"])
            epoch = record["epoch"]
            self._epoch = max(epoch.values()) if isinstance(epoch, dict) else epoch
        held_out = _held_out_ce(record)
        if held_out is None:
            return
        self._losses.clear()
        if self._best is None or held_out < self._best[0]:
            self._best, self._rises = (held_out, record["step"]), 0
        elif self._epoch > 0:  # without repeated rows there is nothing to learn by heart
            self._rises += 1


def _held_out_ce(record: Record) -> float | None:
    """Cross-entropy of an evaluation of held-out rows; None of any other record."""
    found = record.get("held_out")
    return None if found is None else found["ce"]
