"""Positions in chunks, so that a [chunk, V] array is the largest that a loss makes, and the sums over them.

Shape legend:  N positions, n of one chunk, V vocabulary, K kept ids, M teachers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from potstill.cache.errors import InvalidInput, UnsupportedField
from potstill.student_trainer.losses.chunk_likelihood import Chunks, free_cuts
from potstill.student_trainer.losses.divergences import cross_entropy
from potstill.student_trainer.losses.engine import Aim, Divergence, turn_into_gradient
from potstill.student_trainer.losses.objective import Objective
from potstill.student_trainer.losses.targets import NO_LABEL, Loss, TeacherTargets

CHUNK_ELEMENTS = 1 << 25
"""Default [chunk, V] size: 32M float32, 128 MiB. With half of it, going over a weight of 262k ids for every chunk took
a tenth of the time."""

_MOST_MASS = 1.01
"""Teacher mass at one position over which it is no distribution; rounding of kept logprobs stays far below."""

_LABELS_ONLY = Divergence(cross_entropy, has_tail=False)


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over chunks, float64."""

    ce: Tensor
    """[] nats."""
    divergences: Tensor
    """[M] nats."""
    weighted: Tensor
    """[] divergences by their weights and the square of the temperature."""
    most_mass: Tensor
    """[M] the largest mass of a position."""
    alm: Tensor
    """[] divergences of chunks by the teachers' weights."""

    @classmethod
    def of(cls, num_teachers: int, device: torch.device) -> Sums:
        """Begin at zero."""
        ce, divergences, weighted, most_mass, alm = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), num_teachers, (), num_teachers, ())
        )
        return cls(ce, divergences, weighted, most_mass, alm)


@dataclass(frozen=True, slots=True)
class Shares:
    """Factors of a position's cross-entropy and of its divergences in the loss."""

    ce: float
    kl: float
    label: float
    """Of what has a weight of its own beside both, a label."""

    @classmethod
    def of(cls, alpha: float, num_labels: float, num_positions: float) -> Shares:
        """Divide by the counts of the global batch.

        Raises:
            InvalidInput: alpha outside [0, 1].
        """
        if not 0.0 <= alpha <= 1.0:
            raise InvalidInput(f"alpha is {alpha!r}; it must be in [0, 1]")
        return cls((1.0 - alpha) / (num_labels or 1), alpha / (num_positions or 1), 1.0 / (num_labels or 1))


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Everything of N positions but the student, flat."""

    labels: Tensor
    """[N] int64"""
    rows: Tensor | None
    """Indexes of the positions that count; None for all."""
    teachers: tuple[TeacherTargets, ...]
    shares: Shares
    objective: Objective
    vocab: int
    chunk: int
    chunks: tuple[tuple[int, Chunks], ...]
    """Number of each teacher whose chunks the student is held to, and these."""

    @classmethod
    def of(
        cls,
        labels: Tensor,
        mask: Tensor,
        teachers: Sequence[TeacherTargets],
        shares: Shares,
        objective: Objective,
        vocab: int,
        chunk: int | None,
    ) -> Positions:
        """Check and flatten what a loss is called with; see `distillation_loss`.

        Raises:
            InvalidInput: shapes that do not agree.
            UnsupportedField: a teacher lacks what the objective needs.
        """
        _check_shapes(labels, teachers)
        for m, teacher in enumerate(teachers):
            objective.check(teacher, f"teacher {m}")
        flat_mask = mask.reshape(-1)
        # A small array of a chunk counts, too: with all ids kept it is as large as the logits.
        width = vocab + 8 * sum(teacher.ids.shape[-1] for teacher in teachers)
        flat = tuple(teacher.each(lambda tensor: tensor.flatten(0, mask.ndim - 1)) for teacher in teachers)
        return cls(
            labels=labels.reshape(-1),
            rows=None if bool(flat_mask.all()) else flat_mask.nonzero().squeeze(-1),
            teachers=flat,
            shares=shares,
            objective=objective,
            vocab=vocab,
            chunk=chunk or max(1, CHUNK_ELEMENTS // width),
            chunks=_chunks(flat, (labels.reshape(-1) != NO_LABEL) & flat_mask, objective),
        )

    @property
    def factor(self) -> float:
        """Factor of the divergences; see `Objective.temperature`."""
        return self.objective.temperature**2

    def parts(self) -> Iterator[slice | Tensor]:
        """Give the positions that count, chunk by chunk, as what indexes an array of all."""
        count = len(self.labels if self.rows is None else self.rows)
        # Of even sizes, as a last chunk of few positions goes over the whole weight for little.
        num_chunks = -(-count // self.chunk)
        size = -(-count // max(num_chunks, 1))
        ends = list(range(size, count, size)) if size else []
        if self.chunks and ends:
            free = free_cuts([each for _, each in self.chunks], self.rows)
            # Moved on to where no chunk is cut; two may meet there.
            ends = free[torch.searchsorted(free, torch.tensor(ends, device=free.device))].tolist()
        for start, stop in pairwise([0, *(end for end in ends if end < count), count]):
            if start < stop:
                yield slice(start, stop) if self.rows is None else self.rows[start:stop]

    def turn_into_gradient(self, z: Tensor, part: slice | Tensor, sums: Sums) -> Tensor:
        """Turn the logits z [n, V + 1] of one part into their gradient, and add its losses to `sums`.

        Returns:
            The gradient, [n, V + 1]; the array of z or a new one, while z is of no use any more.
        """
        labels = self.labels[part]
        labelled = labels != NO_LABEL
        labels, label_scale = labels.masked_fill(~labelled, self.vocab), labelled.to(z.dtype) * self.shares.ce
        aims = [self._aim(m, part, z, sums) for m in range(len(self.teachers))]
        temperature, divergence = self.objective.temperature, self.objective.divergence
        of_chunks = partial(self._of_chunks, part, sums) if self.chunks else None
        if temperature == 1.0:
            ce, values = turn_into_gradient(z, labels, label_scale, aims, divergence, of_chunks)
        else:
            cooled = z / temperature
            ce, _ = turn_into_gradient(z, labels, label_scale, (), _LABELS_ONLY, of_chunks)
            _, values = turn_into_gradient(cooled, labels, torch.zeros_like(label_scale), aims, divergence)
            z.add_(cooled, alpha=1.0 / temperature)
        sums.ce.add_(torch.where(labelled, ce, 0.0).sum(dtype=torch.float64))
        for m, value in enumerate(values):
            known = value if self.teachers[m].alignment is None else value * self.teachers[m].resolved[part]
            sums.divergences[m] += known.sum(dtype=torch.float64)
            sums.weighted.add_((self.factor * self._weight(m, part) * value).sum(dtype=torch.float64))
        return z

    def loss_of(self, sums: Sums, dtype: torch.dtype) -> Tensor:
        """Mix the sums to the loss [].

        Raises:
            InvalidInput: a teacher's mass is over 1.
        """
        for m, mass in enumerate(sums.most_mass.tolist()):
            if mass > _MOST_MASS:
                raise InvalidInput(
                    f"teacher {m} has a position whose probabilities sum to {mass:.6g}, not to 1; its targets are no "
                    "logprobs of one distribution"
                )
        # A term of scale 0 is left out: an infinite loss that is only measured must not make the whole NaN.
        total = self.shares.kl * sums.weighted if self.shares.kl else torch.zeros_like(sums.ce)
        if self.chunks:
            total = total + self.objective.alm * self.shares.label * sums.alm
        return (total + self.shares.ce * sums.ce if self.shares.ce else total).to(dtype)

    def _aim(self, m: int, part: slice | Tensor, z: Tensor, sums: Sums) -> Aim:
        teacher = self.teachers[m].each(lambda tensor: tensor[part])
        scale = torch.full((len(z),), self.shares.kl * self.factor, dtype=z.dtype, device=z.device)
        aim, mass = self.objective.aim(teacher, self.vocab, (scale * self._weight(m, part)).to(z.dtype))
        torch.maximum(sums.most_mass[m], mass.amax(), out=sums.most_mass[m])
        return aim

    def _of_chunks(self, part: slice | Tensor, sums: Sums, ce: Tensor) -> Tensor:
        """Add the chunks of a part to `sums`; their factor [n] of the gradient of each cross-entropy."""
        scale = torch.zeros_like(ce)
        for m, chunks in self.chunks:
            value, slopes = chunks.measure(part, ce)
            weight = self.teachers[m].weight
            sums.alm.add_(weight * value)
            scale += weight * self.objective.alm * self.shares.label * slopes
        return scale

    def _weight(self, m: int, part: slice | Tensor) -> float | Tensor:
        teacher = self.teachers[m]
        weight = teacher.weight[part] if isinstance(teacher.weight, Tensor) else teacher.weight
        return weight if teacher.alignment is None else weight * teacher.resolved[part]


def as_loss(total: Tensor, sums: Sums) -> Loss:
    """Join a loss [] with what it is made of."""
    return Loss(total, sums.ce, sums.divergences, sums.weighted, sums.alm)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype in which chunks of logits of a dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_agree(name: str, given: Tensor, labels: Tensor, mask: Tensor) -> None:
    """Check that an array [..., any] by that name, labels and mask have the same positions.

    Raises:
        InvalidInput: they have not.
    """
    if given.shape[:-1] != labels.shape or mask.shape != labels.shape:
        raise InvalidInput(
            f"{name} {list(given.shape)}, labels {list(labels.shape)} and mask {list(mask.shape)} do not agree"
        )


def _chunks(
    teachers: Sequence[TeacherTargets], labelled: Tensor, objective: Objective
) -> tuple[tuple[int, Chunks], ...]:
    # A worker's micro-batch may have no rows, so that no teacher says whether it has chunks.
    if not objective.alm or not teachers or not labelled.any():
        return ()
    if any(isinstance(teacher.weight, Tensor) for teacher in teachers):
        raise InvalidInput("alm takes one weight a teacher, as a chunk has several tokens; leave weights by token out")
    aligned = [(m, teacher.alignment) for m, teacher in enumerate(teachers) if teacher.alignment is not None]
    if not aligned:
        raise UnsupportedField(
            "alm needs a teacher whose targets `potstill project` made of another tokenizer's; leave it out"
        )
    return tuple((m, Chunks.in_alignment(alignment, labelled)) for m, alignment in aligned)


def _check_shapes(labels: Tensor, teachers: Sequence[TeacherTargets]) -> None:
    positions = labels.shape
    for m, t in enumerate(teachers):
        if t.log_tail.shape != positions or t.ids.shape[:-1] != positions or t.logprobs.shape != t.ids.shape:
            raise InvalidInput(
                f"teacher {m}: ids {list(t.ids.shape)}, logprobs {list(t.logprobs.shape)} and log_tail "
                f"{list(t.log_tail.shape)} do not fit labels {list(positions)}"
            )
        for name in ("drawn_ids", "drawn_counts", "log_z", "entropy", "label_logprob", "weight", "alignment"):
            value = getattr(t, name)
            wide = name.startswith("drawn_") or name == "alignment"
            if isinstance(value, Tensor) and value.shape[: value.ndim - wide] != positions:
                raise InvalidInput(f"teacher {m}: {name} {list(value.shape)} does not fit labels {list(positions)}")
