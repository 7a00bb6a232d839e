"""Measures of a trained student on each held-out document, made alike for all cells of an ablation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.student_trainer.ablate.outcome import LOSS, PerDocument
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.labels import LabelTable
from potstill.student_trainer.evaluate.measuring import measure
from potstill.student_trainer.evaluate.positions import KEPT, TEXT
from potstill.student_trainer.models.build import load_student
from potstill.student_trainer.parallel.group import device_for
from potstill.student_trainer.train.run import open_run

_OF_TEACHERS = ("kl", "top1")


def judge(student: Path, base: TrainConfig) -> dict[str, PerDocument]:
    """Measure a student on the held-out rows, against all teachers of the run that the cells change.

    A cell that learns from fewer teachers, or of fewer of their ids, is judged by all of them: else each cell had a
    measure of its own.

    Args:
        student: folder of the model.
        base: the run that the cells change.

    Raises:
        PotstillError: whatever reading rows and targets raises.
    """
    with open_run(base) as run:
        model = load_student(student).to(device_for(base.train.device))
        sums = measure(model, run.reader, run.held_out, LabelTable.of(run.corpus.tokenizer), {}, dtype=base.train.dtype)
    text = sums.text.sum(axis=1)
    found = {LOSS: _of(text[:, TEXT.index("labels")], text[:, TEXT.index("loss")])}
    for name, kept in sums.kept.items():
        columns = kept.sum(axis=1)
        found |= {f"{each} {name}": _of(columns[:, 0], columns[:, KEPT.index(each)]) for each in _OF_TEACHERS}
    return found


def _of(counts: NDArray[np.float64], sums: NDArray[np.float64]) -> PerDocument:
    return PerDocument(counts.tolist(), sums.tolist())
