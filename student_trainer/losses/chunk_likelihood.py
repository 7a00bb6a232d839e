"""Approximate likelihood matching (ALM, arXiv 2503.20083): the likelihoods that student and teacher give to chunks.

A chunk is a piece of text that begins and ends where both tokenizers have a boundary. Of its log-likelihoods l_t and
l_s, with T = 100, a = l_t / T - 1e-6 and b = l_s / T - 1e-6, the loss is

    T (e^a (a - b) + (1 - e^a) (log1mexp(a) - log1mexp(b)))

the divergence of two events of probability e^a and e^b. By the factor T its derivative by l_s is about a / b - 1, of
the size of cross-entropy's; T flattens strongly, so that only chunks of hundreds of nats are told apart less.

Shape legend:  N positions, n of one part, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.cache.types import ALIGNMENT

_T = 100.0
_NEAREST = 1e-6
_LOGPROB, _TOKENS = ALIGNMENT.index("chunk_logprob"), ALIGNMENT.index("chunk_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The chunks of one teacher that a student is held to: those whose tokens are all labels."""

    of: Tensor
    """[N] int64 number of the chunk of each position's label; C where it is in none."""
    logprob: Tensor
    """[C] the teacher's log-likelihood."""

    @classmethod
    def in_alignment(cls, alignment: Tensor, labelled: Tensor) -> Chunks:
        """Find them in `Targets.alignment` [N, 3], by which positions have a label [N]."""
        tokens = alignment[:, _TOKENS].long()
        ends = tokens.nonzero().squeeze(-1)
        lengths = tokens[ends]
        before = torch.cat([labelled.new_zeros(1, dtype=torch.long), labelled.long().cumsum(0)])
        begins = ends + 1 - lengths
        whole = (begins >= 0) & (before[ends + 1] - before[begins.clamp(min=0)] == lengths)
        ends, begins, lengths = ends[whole], begins[whole], lengths[whole]
        numbers = torch.arange(len(ends), device=ends.device).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        places = begins.repeat_interleave(lengths) + torch.arange(len(numbers), device=ends.device) - first
        of = torch.full_like(tokens, len(ends))
        of[places] = numbers
        return cls(of, alignment[ends, _LOGPROB])

    def cuts(self, counted: Tensor | None) -> Tensor:
        """Tell between which of the positions that count [M + 1] no chunk is cut; None stands for all positions."""
        of = self.of if counted is None else self.of[counted]
        free = torch.ones(len(of) + 1, dtype=torch.bool, device=of.device)
        free[1:-1] = (of[1:] != of[:-1]) | (of[1:] == len(self.logprob))
        return free

    def measure(self, part: slice | Tensor, ce: Tensor) -> tuple[Tensor, Tensor]:
        """Measure the chunks of a part that cuts none, by its cross-entropies [n].

        Returns:
            The sum of the loss over chunks, [] float64, and its derivative by each cross-entropy, [n].
        """
        of, count = self.of[part], len(self.logprob)
        inside = of < count
        present, local = of[inside].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        nats = ce.new_zeros(len(present), dtype=torch.float64).index_add_(0, local, ce[inside].double())
        value, slope = _divergence(self.logprob[present].double(), -nats)
        slopes = torch.zeros_like(ce)
        slopes[inside] = -slope[local].to(ce.dtype)
        return value.sum(), slopes


def free_cuts(chunks: Sequence[Chunks], counted: Tensor | None) -> Tensor:
    """Places [F] int64, rising, at which positions that count can be cut without cutting a chunk of any teacher."""
    free = chunks[0].cuts(counted)
    for each in chunks[1:]:
        free = free & each.cuts(counted)
    return free.nonzero().squeeze(-1)


def _divergence(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of log-likelihoods [C], and its derivative by the student's."""
    a, b = teacher.clamp(max=0.0) / _T - _NEAREST, student.clamp(max=0.0) / _T - _NEAREST
    value = a.exp() * (a - b) - torch.expm1(a) * (_log1mexp(a) - _log1mexp(b))
    return _T * value, -a.exp() - torch.expm1(a) / torch.expm1(-b)


def _log1mexp(x: Tensor) -> Tensor:
    return torch.log(-torch.expm1(x))
