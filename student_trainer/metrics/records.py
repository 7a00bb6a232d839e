"""Metrics of a run: one JSON line per step and per evaluation, and the numbers again for trackers like TensorBoard.

    {"step": 7, "loss": 6.1, "ce": 6.4, "kl": {"big": 1.2}, "lr": 3e-4, "grad_norm": 0.8, "epoch": 0,
     "padding": 0.01, "tokens": 28672, "tokens_per_second": 3100.0, "waiting_seconds": 0.0, "waiting_share": 0.0,
     "peak_memory_bytes": 913408000, "mfu": 0.41, "seconds": 9.2}
    {"step": 100, "held_out": {"rows": 64, "ce": 5.9, "teachers": {"big": {"kl": 0.9, ...}}},
     "evaluations": {"wiki": {"rows": ...}}, "train_ce": 5.7, "gap": 0.2}
    {"step": 500, "rollback": {"from_step": 612, "skipped_rows": 32, "number": 1, "why": "the loss is 9.1, ..."}}

A student with experts that has `output_router_logits` adds `router_loss`, before its coefficient; a run with
`train.alm` adds `alm`, before that weight. `kl` and `alm` are of steps that read targets.

Losses are nats per token; `kl` is of a teacher's tokens by what is resolved of each, where they are projected.
`train_ce` is the mean `ce` of the steps since the evaluation before, and `gap` how much higher that of the held-out
rows is. `tokens` are targets learnt: neither padding, nor a prefix, nor what the corpus's loss mask leaves out;
`padding` is a share of all tokens. `waiting_seconds` were spent waiting for rows, a `waiting_share` of the step's time;
`peak_memory_bytes` are those of the run so far, of tensors on a GPU or else of the whole process, and `mfu` is there
where the peak of the devices is known (`speed`). With several corpora `epoch` is an object, by corpus.
Lines of steps after the checkpoint that a run resumes from are dropped and written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.student_trainer.config.leaves import leaves
from potstill.student_trainer.config.run_folder import write_lines
from potstill.student_trainer.metrics.trackers import Tracker

Record = Mapping[str, Any]


class MetricsWriter:
    """Appends records to `metrics.jsonl` of a run, and gives their numbers to trackers. Its owner closes it."""

    def __init__(self, run_dir: Path, trackers: Sequence[Tracker] = (), *, step: int) -> None:
        """Start after `step`; records of later steps are from a session that was lost, and are dropped."""
        self._file = run_dir / "metrics.jsonl"
        kept = [line for line, record in _lines(self._file) if record["step"] <= step]
        write_lines(self._file, kept)
        self._out = self._file.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, record: Record) -> None:
        """Append one record, which has a `step`."""
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()  # another process follows the file
        numbers = {
            name: value for name, value in leaves(record, "/") if name != "step" and isinstance(value, int | float)
        }
        for tracker in self._trackers:
            tracker.write(numbers, record["step"])

    def close(self) -> None:
        """Flush and close the file and the trackers."""
        self._out.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read all complete records of a run, in order."""
    return [record for _, record in _lines(run_dir / "metrics.jsonl")]


class MetricsFollower:
    """Reads the records that another process appends to a run's `metrics.jsonl`."""

    def __init__(self, run_dir: Path, *, after_step: int) -> None:
        """Begin after `after_step`; records up to that step are from an earlier session and are not returned."""
        self._file = run_dir / "metrics.jsonl"
        self._after_step = after_step
        self._rollbacks = max((_rollback(record) for _, record in _lines(self._file)), default=0)
        self._inode = 0
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Read the complete records since the last call; one that a restarted session writes again comes once."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:  # a session has replaced the file: read it from the top
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]  # the writer may be in the middle of a line
        self._offset += len(complete)
        return [record for line in complete.splitlines() if self._is_new(record := json.loads(line))]

    def _is_new(self, record: Record) -> bool:
        if (number := _rollback(record)) > 0:
            if number <= self._rollbacks:
                return False
            self._rollbacks, self._after_step = number, record["step"]  # the steps after it come again
            return True
        # A step's own record comes before its evaluation; the first evaluation has no step before it.
        step = record["step"]
        if "loss" not in record:
            return bool(step >= self._after_step)
        new = bool(step > self._after_step)
        self._after_step = max(self._after_step, step)
        return new


def _rollback(record: Record) -> int:
    """Number of the rollback that a record tells of; 0 for other records."""
    return int(record["rollback"]["number"]) if "rollback" in record else 0


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            return  # a line cut short by a killed process; nothing after it
