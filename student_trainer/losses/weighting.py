"""Weights of several teachers at each token, from what is kept of each of them there.

    by entropy   w_m exp(-H_m / beta)          a teacher that is sure counts more
    by label     w_m t_m(y) ** (1 / beta)      a teacher that finds the next token likely counts more; this guards
                                               against one that is sure and wrong (CA-MKD, arXiv 2201.00007)

both divided by their sum over the teachers, where w_m are the weights that the run gives. Where a token has no label,
or something is not known, the weights are those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from potstill.cache.errors import UnsupportedField
from potstill.student_trainer.losses.targets import TeacherTargets


def weighted(
    teachers: Sequence[TeacherTargets], weights: Sequence[float], weighting: str = "fixed", beta: float = 1.0
) -> list[TeacherTargets]:
    """Give teachers their weights at each position.

    Args:
        teachers: targets of the same positions.
        weights: one a teacher, 0 or more, summing to 1.
        weighting: `fixed` as given, `entropy`, or `label`.
        beta: nats that make a factor of e.

    Raises:
        UnsupportedField: a teacher has no entropy, or no logprobs of labels.
    """
    if weighting == "fixed":
        return [replace(teacher, weight=weight) for teacher, weight in zip(teachers, weights, strict=True)]
    trusts = []
    for m, teacher in enumerate(teachers):
        trust = teacher.label_logprob if weighting == "label" else teacher.entropy
        if trust is None:
            what, way = ("entropy", "--entropy") if weighting == "entropy" else ("logprobs of labels", "--top-k 64")
            raise UnsupportedField(
                f"weighting {weighting!r} needs {what}, which teacher {m} has not; prefill with {way}"
            )
        trusts.append(trust.float() if weighting == "label" else -trust.float())
    given = torch.tensor(weights, device=trusts[0].device)
    found = torch.softmax(torch.stack(trusts, dim=-1) / beta + given.log(), dim=-1)
    found = torch.where(found.isnan().any(dim=-1, keepdim=True), given, found)
    return [replace(teacher, weight=found[..., m]) for m, teacher in enumerate(teachers)]
