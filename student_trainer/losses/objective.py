"""The loss that is chosen, and what it makes of a teacher's targets.

Shape legend:  [..., K] kept ids at some axes of positions, n positions, V the student's vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.cache.errors import InvalidInput, UnsupportedField
from potstill.student_trainer.losses.divergences import DIVERGENCES, MIN_TAIL_MASS, cross_entropy, jsd
from potstill.student_trainer.losses.draws import drawn, exact_and_drawn
from potstill.student_trainer.losses.engine import Aim, Divergence
from potstill.student_trainer.losses.targets import TeacherTargets
from potstill.student_trainer.losses.temperature import at_temperature

OF_DRAWS = ("draws", "hybrid")
LOSSES = (*DIVERGENCES, *OF_DRAWS)
"""Names of losses."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A choice of loss.

    Raises:
        InvalidInput: an unknown loss, or a number out of its range.
    """

    loss: str = "forward_kl"
    """One of `LOSSES`."""
    beta: float = 0.5
    """Beta of `jsd`, in (0, 1): towards 0 it is the forward KL's direction, towards 1 the reverse KL's."""
    temperature: float = 1.0
    """T at which both distributions are compared; the divergence counts T**2 times, so that its gradient keeps its
    size beside that of cross-entropy (arXiv 1503.02531)."""
    alm: float = 0.0
    """Weight of the likelihoods of chunks beside all else, for teachers with another tokenizer (`chunk_likelihood`)."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidInput(f"loss is {self.loss!r}; known are {', '.join(LOSSES)}")
        if not 0.0 < self.beta < 1.0:
            raise InvalidInput(f"beta is {self.beta!r}; it must be over 0 and below 1")
        if not 0.0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature is {self.temperature!r}; it must be a positive number")
        if not 0.0 <= self.alm < math.inf:
            raise InvalidInput(f"alm is {self.alm!r}; it must be a number of at least 0")
        if self.temperature != 1.0 and self.loss in OF_DRAWS:
            raise InvalidInput(
                f"temperature is {self.temperature:g}, but draws are of temperature 1; leave it out with {self.loss!r}"
            )

    @property
    def divergence(self) -> Divergence:
        """The loss as the engine takes it."""
        if self.loss == "jsd":
            return Divergence(jsd(self.beta))
        return DIVERGENCES.get(self.loss, Divergence(cross_entropy, has_tail=False))

    def check(self, teacher: TeacherTargets, name: str) -> None:
        """Refuse targets that lack what the loss needs.

        Raises:
            UnsupportedField: they lack it; the option that adds it is named.
        """
        if self.loss in OF_DRAWS and (teacher.drawn_ids is None or teacher.drawn_counts is None):
            raise UnsupportedField(f"loss {self.loss!r} needs draws, which {name} has not; prefill with --draws 50")
        if self.loss != "draws" and not teacher.ids.shape[-1]:
            raise UnsupportedField(f"loss {self.loss!r} needs a top-k, which {name} has not; prefill with --top-k 64")
        if self.temperature != 1.0 and teacher.log_z is None:
            raise UnsupportedField(
                f"temperature {self.temperature:g} needs log Z at it, which {name} has not; prefill with "
                f"--temperatures {self.temperature:g}"
            )

    def aim(self, teacher: TeacherTargets, vocab: int, scale: Tensor) -> tuple[Aim, Tensor]:
        """Make the engine's aim of one teacher's targets at n positions, in the dtype of `scale` [n].

        Returns:
            The aim, and the teacher's whole mass [n], which is 1 but for rounding.
        """
        if self.loss == "draws":
            ids, log_t, log_r = drawn(teacher)
        elif self.loss == "hybrid":
            ids, log_t, log_r = exact_and_drawn(teacher)
        elif self.temperature != 1.0:
            ids, log_t, log_r = at_temperature(teacher, self.temperature)
        else:
            ids, log_t, log_r = teacher.ids.long(), *_resolved(teacher)
        whole = teacher.logprobs if self.loss in OF_DRAWS else log_t
        mass = whole.exp().sum(dim=-1) + (teacher.log_tail if self.loss in OF_DRAWS else log_r).exp()
        log_t, log_r = log_t.to(scale.dtype), log_r.to(scale.dtype)
        # What the student does not have cannot be taught; its mass joins the tail, so that the sum stays 1.
        inside = ids < vocab
        folded = torch.logaddexp(log_r, torch.logsumexp(log_t.masked_fill(inside, -math.inf), dim=-1))
        log_t = log_t.masked_fill(~inside, -math.inf)
        folded = folded.masked_fill(folded < math.log(MIN_TAIL_MASS), -math.inf)
        return Aim(ids.clamp(max=vocab), log_t, folded, scale), mass


def _resolved(teacher: TeacherTargets) -> tuple[Tensor, Tensor]:
    """Logprobs of the kept ids and of the rest, without the mass of which it is not known which id it is of.

    In the tail it would teach that it is of none of the kept ids, of which it mostly is.
    """
    if teacher.alignment is None:
        return teacher.logprobs, teacher.log_tail
    rest = (teacher.log_tail.exp() - teacher.alignment[..., 0]).clamp(min=0.0)
    # What is there is summed, as both the unresolved mass and the others may be rounded.
    whole = (teacher.logprobs.exp().sum(dim=-1) + rest).clamp(min=MIN_TAIL_MASS).log()
    return teacher.logprobs - whole.unsqueeze(-1), rest.log() - whole
