"""Measures of a trained student on each held-out document, made alike for all cells of an ablation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.student_trainer.ablate.asked import Asked, answers
from potstill.student_trainer.ablate.measures import ECE, KL, LOSS, OVERCONFIDENCE, TOP1
from potstill.student_trainer.ablate.outcome import PerDocument
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.calibration import CONFIDENCE, RIGHT
from potstill.student_trainer.evaluate.labels import LabelTable
from potstill.student_trainer.evaluate.measuring import Sums, measure
from potstill.student_trainer.evaluate.positions import KEPT, TEXT
from potstill.student_trainer.models.build import load_student
from potstill.student_trainer.models.corpus_tokenizer import model_tokenizer
from potstill.student_trainer.parallel.group import device_for
from potstill.student_trainer.train.run import open_run


def judge(student: Path, base: TrainConfig, asked: Asked | None) -> tuple[dict[str, PerDocument], list[str]]:
    """Measure a student on the held-out rows, against all teachers of the run that the cells change, and by tasks.

    A cell that learns from fewer teachers, or of fewer of their ids, is judged by all of them: else each cell had a
    measure of its own.

    Args:
        student: folder of the model.
        base: the run that the cells change.
        asked: tasks, if there are any.

    Returns:
        The measures by name, and what there is to say of them.

    Raises:
        PotstillError: whatever reading rows and targets, or running tasks, raises.
    """
    with open_run(base) as run:
        model = load_student(student).to(device_for(base.train.device))
        sums = measure(model, run.reader, run.held_out, LabelTable.of(run.corpus.tokenizer), {}, dtype=base.train.dtype)
        found = _of_text(sums) | _of_teachers(sums)
        if asked is None:
            return found, []
        of_tasks, notes = answers(asked, model, model_tokenizer(model.config, run.corpus))
        return found | of_tasks, notes


def _of_text(sums: Sums) -> dict[str, PerDocument]:
    columns = sums.text.sum(axis=1)
    labels, loss, right = (columns[:, TEXT.index(name)] for name in ("labels", "loss", "right"))
    over = sums.bins[:, :, CONFIDENCE] - sums.bins[:, :, RIGHT]
    return {
        LOSS: _of(labels, loss),
        TOP1: _of(labels, right, higher_is_better=True),
        ECE: _of(labels, over),
        OVERCONFIDENCE: _of(labels, over.sum(axis=1), higher_is_better=None),
    }


def _of_teachers(sums: Sums) -> dict[str, PerDocument]:
    found = {}
    for name, kept in sums.kept.items():
        columns = kept.sum(axis=1)
        kl, top1 = (columns[:, KEPT.index(each)] for each in ("kl", "top1"))
        found[f"{KL}{name}"] = _of(columns[:, 0], kl)
        found[f"{TOP1} {name}"] = _of(columns[:, 0], top1, higher_is_better=True)
    return found


def _of(
    counts: NDArray[np.float64], sums: NDArray[np.float64], *, higher_is_better: bool | None = False
) -> PerDocument:
    return PerDocument(counts.tolist(), sums.tolist(), higher_is_better)
