"""Evaluation of a student on rows it never saw: its cross-entropy, and its distance from each teacher.

Sums are float64 and reduced over the workers, so that the number of workers changes the result by the rounding of the
forward passes only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.student_trainer.data import Batch, BatchReader
from potstill.student_trainer.data.held_out import num_documents
from potstill.student_trainer.data.prefetch import Copies
from potstill.student_trainer.data.repeated import RepeatedBatches
from potstill.student_trainer.evaluate.result import Evaluation, TeacherAgreement
from potstill.student_trainer.losses import NO_LABEL, kl_and_overlap
from potstill.student_trainer.models.precision import autocast
from potstill.student_trainer.parallel.agreement import all_have_read
from potstill.student_trainer.parallel.group import Group

_OF_TEACHER = ("positions", "kl", "agreement", "mass")
"""Sums, each less by what is not resolved of a projected position, so that means are of what the teacher says."""
_CHUNK_POSITIONS = 512
"""Positions at a time, as a float32 copy of a whole batch's [B * T, V] logits may not fit beside them."""


def evaluate_student(
    model: nn.Module,
    reader: BatchReader,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    batch_rows: int = 8,
    group: Group | None = None,
    dtype: str = "float32",
    batches: RepeatedBatches | None = None,
) -> Evaluation:
    """Evaluate on `rows` of the reader's corpus, against the reader's sources.

    Args:
        model: a causal language model on the group's device; left in the mode it was in.
        reader: rows and targets; a reader without sources gives the cross-entropy only.
        rows: row indexes, at least one.
        batch_rows: rows of one forward pass.
        group: the workers that share the rows; every one gets the result. By default this process alone.
        dtype: of the forward pass, `float32` or `bfloat16`.
        batches: of this worker's part of the rows, where they were read before (`batches_of`).

    Raises:
        PotstillError: whatever reading raises, and on all workers when one got no answer.
    """
    group = group or Group()
    names = [source.name for source in reader.sources if source.top_k]
    measured = [m for m, source in enumerate(reader.sources) if source.top_k]
    sums = torch.zeros(3 + len(_OF_TEACHER) * len(names), dtype=torch.float64, device=group.device)
    batches = batches or batches_of(reader, rows, batch_rows=batch_rows, group=group)
    # No worker waits for another within the loop, so they need not have equally many batches, unless each forward pass
    # is one of all together. One that got no answer tells the others, who would wait for its sums.
    with evaluating(model), all_have_read(group), batches.read() as found:
        together = _in_step(found, group, lambda: reader.read(rows[:1]))
        copies = Copies(group.device)
        for read, counts in together if group.in_step else ((one, True) for one in found):
            batch = copies.of(read)
            with autocast(group.device, dtype):
                logits = model(**batch.inputs).logits
            if counts:
                sums += _sums(logits, batch, measured)
    group.all_reduce_sum(sums)
    documents = num_documents(reader.corpus.document_rows, np.asarray(rows))
    return _evaluation(sums.tolist(), names, rows=len(rows), documents=documents)


def batches_of(
    reader: BatchReader,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    batch_rows: int,
    group: Group,
    pack: bool = False,
    readers: int = 1,
) -> RepeatedBatches:
    """Make the batches of a worker's part of the rows to evaluate on; arguments as of `RepeatedBatches`."""
    mine = np.asarray(rows)[group.rank :: group.world_size]
    return RepeatedBatches(reader, mine, batch_rows, pack=pack, readers=readers)


def _in_step(batches: Iterator[Batch], group: Group, spare: Callable[[], Batch]) -> Iterator[tuple[Batch, bool]]:
    """Give a worker's batches with True, then one with False until all other workers have given theirs, too.

    Raises:
        PotstillError: whatever reading raises, and on all workers when one got no answer.
    """
    last: Batch | None = None
    while True:
        with all_have_read(group):
            batch = next(batches, None)
            last = batch or last or spare()
        more = group.all_reduce_sum(torch.tensor(float(batch is not None), device=group.device))
        if not more.item():
            return
        yield last, batch is not None


def _evaluation(sums: list[float], names: Sequence[str], *, rows: int, documents: int) -> Evaluation:
    """Make means of the sums of all batches (`_sums`)."""
    ce, labels, positions, *rest = sums
    per_teacher = {}
    for m, name in enumerate(names):
        said, *means = rest[len(_OF_TEACHER) * m : len(_OF_TEACHER) * (m + 1)]
        if said:
            kl, top1, mass = (each / said for each in means)
            per_teacher[name] = TeacherAgreement(kl=kl, top1_agreement=top1, student_mass_on_top_k=mass)
    return Evaluation(
        rows=rows,
        documents=documents,
        tokens=int(positions),
        ce=ce / labels if labels else None,
        teachers=per_teacher,
    )


def _sums(logits: Tensor, batch: Batch, measured: Sequence[int]) -> Tensor:
    """Sums over a batch, float64 [3 + 4 M]: CE, labels, positions; `_OF_TEACHER` of each measured teacher."""
    mask = batch.mask.reshape(-1)
    flat = logits.reshape(-1, logits.shape[-1])[mask]
    labels = batch.labels.reshape(-1)[mask]
    teachers = [
        teacher.each(lambda tensor: tensor.flatten(0, 1)[mask]) for teacher in (batch.teachers[m] for m in measured)
    ]
    values = [flat.new_zeros((), dtype=torch.float64) for _ in range(len(_OF_TEACHER) * len(teachers))]
    ce = flat.new_zeros((), dtype=torch.float64)
    for start in range(0, len(labels), _CHUNK_POSITIONS):
        part = slice(start, start + _CHUNK_POSITIONS)
        z = flat[part].float()
        ce += nn.functional.cross_entropy(z, labels[part], ignore_index=NO_LABEL, reduction="sum").double()
        for m, teacher in enumerate(teachers):
            here = teacher.each(operator.itemgetter(part))
            said = here.resolved
            for i, value in enumerate((torch.ones_like(said), *kl_and_overlap(z, here))):
                values[len(_OF_TEACHER) * m + i] += (value * said).sum(dtype=torch.float64)
    counts = [ce.new_tensor(float((labels != NO_LABEL).sum())), ce.new_tensor(float(len(labels)))]
    return torch.stack([ce, *counts, *values])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into its mode of evaluation, without gradients, until the block ends."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
