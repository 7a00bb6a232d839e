"""The gradient of every loss that sees the student through log p on some ids K and log p of the rest.

Let p = softmax(z) over the vocabulary, and p_r the mass outside K. Of a loss f(log p_K, log p_r) with derivatives
ga [K] and gb, and s = sum(ga) + gb,

    df/dz_j = ga_j - s p_j                          j in K
            = (gb - s p_r) exp(z_j - LSE_tail)      otherwise

where LSE_tail is the log-sum-exp of the logits outside K. (The second is p_j (gb / p_r - s), which is inf * 0 where
p_r underflows; as written it is exact.) A loss is thus a few lines on small arrays, and what follows is written once.

Several losses of one position, each with its own K, are summed by one pass over the row. The logits in the union of
all K are set to -inf, e_j = exp(z_j - max) is written over the others, and `rest` is the log of their sum. Each tail is
`rest` and the few logits that are in the union but not in its own K, and outside the union every gradient is a number
of the row times e_j; `rows` has these two passes. So there is no second array of the logits' size, and no difference of
two large sums: a student that puts all but e**-60 on one id keeps an exact tail.

Shape legend:  n positions, V vocabulary, K ids of one loss, U those of all losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.student_trainer.losses.rows import rows_for


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """The masses that one loss holds the student to, at n positions: t on K, and r outside."""

    ids: Tensor
    """[n, K] int64, without repeats; V for an id that the student does not have, and has no part in the loss."""
    log_t: Tensor
    """[n, K]; -inf for no mass."""
    log_r: Tensor
    """[n]; -inf for no mass."""
    scale: Tensor
    """[n] factor of the loss's gradient at each position."""


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """An aim and a student at n positions. Ids that the student lacks have no mass in either."""

    log_t: Tensor  # [n, K]
    log_r: Tensor  # [n]; -inf where K is all of the vocabulary: mass there cannot be learnt
    log_p: Tensor  # [n, K]
    log_p_r: Tensor  # [n]; as `log_r` where the loss does not ask for the tail

    @property
    def t(self) -> Tensor:
        """Mass, [n, K]."""
        return self.log_t.exp()

    @property
    def r(self) -> Tensor:
        """Mass, [n]."""
        return self.log_r.exp()

    @property
    def p(self) -> Tensor:
        """Mass, [n, K]."""
        return self.log_p.exp()

    @property
    def p_r(self) -> Tensor:
        """Mass, [n]."""
        return self.log_p_r.exp()


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A loss at n positions, and its derivatives."""

    value: Tensor
    """[n]"""
    by_log_p: Tensor
    """[n, K]; a constant times p may be left out, here and below, as it has no effect on the gradient."""
    by_log_p_r: Tensor | None = None
    """[n]; None where the loss does not depend on it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A loss as the engine takes it."""

    measure: Callable[[Compared], Measured]
    has_tail: bool = True
    """False for a loss that does not look at the rest: then nothing is done to know it."""


class Scratch:
    """An array [n, V + 1] for the logits of one chunk after another.

    Its last column stands for ids that the student does not have.
    """

    def __init__(self, vocab: int, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._columns, self._dtype = like, vocab + 1, dtype
        self._held = like.new_empty((0, self._columns), dtype=dtype)

    def take(self, num_positions: int) -> Tensor:
        """Make an array for so many positions n; the one taken before is of no use any more."""
        # On a CPU the pages of new memory for every chunk would take a fifth of the time of a cross-entropy.
        if len(self._held) < num_positions:
            self._held = self._like.new_empty((0,), dtype=self._dtype)  # two are never held
            self._held = self._like.new_empty((num_positions, self._columns), dtype=self._dtype)
        z = self._held[:num_positions]
        z[:, -1] = -math.inf
        return z


def turn_into_gradient(
    z: Tensor,
    labels: Tensor,
    label_scale: Tensor,
    aims: Sequence[Aim],
    divergence: Divergence,
    more_of_labels: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Write the gradient of cross-entropy and of each aim's divergence, by their scales, over the logits.

    Args:
        z: [n, V + 1] logits in a `Scratch`; float32 or float64.
        labels: [n] int64; V where there is none.
        label_scale: [n] factor of the gradient of cross-entropy; 0 where there is no label.
        aims: what the divergence is measured to.
        divergence: the loss of each aim.
        more_of_labels: gives for cross-entropies [n] what is added to `label_scale`, as of a loss of several labels.

    Returns:
        Cross-entropy [n] in nats, of no meaning where there is no label, and the divergence [n] of each aim.
    """
    # Few large gathers and scatters: each goes over memory that no cache holds any more.
    ids = torch.cat([*(aim.ids for aim in aims), labels[:, None]], dim=-1)
    *kept, label_z = torch.split_with_sizes(z.gather(-1, ids), [*(aim.ids.shape[-1] for aim in aims), 1], dim=-1)
    union = _Union.taken_from(z, [aim.ids for aim in aims], kept) if divergence.has_tail else _Union.empty(z)
    rows = rows_for(z.device)
    top, e_sum = rows.sums(z)
    rest = top + e_sum.log()
    lse = torch.logaddexp(rest, union.lse())
    ce = lse - label_z.squeeze(-1)
    if more_of_labels is not None:
        label_scale = label_scale + more_of_labels(ce)
    total_s, at_rest, at_union, values, by_id = -label_scale, torch.zeros_like(rest), torch.zeros_like(union.z), [], []
    for m, (aim, z_kept) in enumerate(zip(aims, kept, strict=True)):
        tail = torch.logaddexp(rest, union.lse(outside=m)) if divergence.has_tail else torch.full_like(rest, -math.inf)
        found = divergence.measure(_compared(aim, z_kept, tail, lse))
        values.append(found.value)
        by_id.append(aim.scale[:, None] * found.by_log_p)
        total_s = total_s + by_id[-1].sum(dim=-1)
        if found.by_log_p_r is not None:
            by_rest, finite_tail = aim.scale * found.by_log_p_r, tail.masked_fill(tail == -math.inf, 0.0)
            total_s = total_s + by_rest
            at_rest += by_rest * torch.exp(rest - finite_tail)
            union.add_shares(at_union, m, by_rest, finite_tail)
    factor = (at_rest - total_s * torch.exp(rest - lse)) / e_sum
    rows.write(z, top, factor.masked_fill(e_sum == 0, 0.0))
    added = torch.cat([*by_id, -label_scale[:, None]], dim=-1)
    added[:, : union.z.shape[-1]] += at_union - total_s[:, None] * torch.exp(union.z - lse[:, None])
    z.scatter_add_(-1, ids, added)
    return ce, values


def compare(z: Tensor, aim: Aim) -> Compared:
    """Compare one aim with a student, without gradient; z [n, V + 1] is of no use afterwards."""
    kept = z.gather(-1, aim.ids)
    z.scatter_(-1, aim.ids, -math.inf)
    tail = torch.logsumexp(z, dim=-1)
    lse = torch.logaddexp(tail, torch.logsumexp(kept, dim=-1))
    return _compared(aim, kept, tail, lse)


def _compared(aim: Aim, kept: Tensor, tail: Tensor, lse: Tensor) -> Compared:
    # Where K is all of the vocabulary, mass outside it has nowhere to go and cannot be learnt: it is dropped.
    log_r = aim.log_r.masked_fill(tail == -math.inf, -math.inf)
    return Compared(aim.log_t, log_r, kept - lse[:, None], tail - lse)


@dataclass(frozen=True, slots=True, eq=False)
class _Union:
    """The logits of the ids of all aims, side by side."""

    z: Tensor  # [n, U] logits; -inf where the id stands further left already, so that each counts once
    columns: list[int]  # K of each aim
    shared: Mapping[tuple[int, int], Tensor]  # [n, K] bool by two aims: which ids of the second the first has, too

    @classmethod
    def empty(cls, z: Tensor) -> _Union:
        return cls(z.new_empty((len(z), 0)), [], {})

    @classmethod
    def taken_from(cls, z: Tensor, ids: Sequence[Tensor], kept: Sequence[Tensor]) -> _Union:
        """Collect the logits `kept` of ids, and set them in `z` to -inf."""
        if not ids:
            return cls.empty(z)
        union = cls(torch.cat(list(kept), dim=-1), [each.shape[-1] for each in ids], _shared(ids))
        for (m, other), those in union.shared.items():
            if m < other:
                union.of_aims(union.z)[other].masked_fill_(those, -math.inf)
        z.scatter_(-1, torch.cat(list(ids), dim=-1), -math.inf)
        return union

    def of_aims(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Views [n, K] of the columns [n, U] of each aim."""
        return torch.split_with_sizes(columns, self.columns, dim=-1)

    def lse(self, outside: int | None = None) -> Tensor:
        """[n] log-sum-exp of the logits, or of those that are not in one aim."""
        if outside is None:
            return torch.logsumexp(self.z, dim=-1)
        z = self.of_aims(self.z)
        rest = [z[m].masked_fill(those, -math.inf) for (aim, m), those in self.shared.items() if aim == outside]
        return torch.logsumexp(torch.cat(rest, dim=-1) if rest else z[outside][:, :0], dim=-1)

    def add_shares(self, to: Tensor, outside: int, factor: Tensor, tail: Tensor) -> None:
        """Add to [n, U] the share of each id in the tail [n] of an aim, by factors [n]; its own ids have none."""
        z, to_aims = self.of_aims(self.z), self.of_aims(to)
        for (aim, m), those in self.shared.items():
            if aim == outside:
                shares = torch.exp(z[m] - tail[:, None]).masked_fill_(those, 0.0)
                to_aims[m].addcmul_(shares, factor[:, None])


def _shared(ids: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Tell for every two aims which ids [n, K] of the second the first has, too."""
    # Sorting a few ids costs a fraction of comparing all pairs, or of marks among logits that no cache holds.
    in_order = [each.int().sort(dim=-1) for each in ids[1:]]
    shared = {}
    for second in range(1, len(ids)):
        values, places = in_order[second - 1]
        for first in range(second):
            asked = ids[first].int()
            at = torch.searchsorted(values, asked).clamp_(max=values.shape[-1] - 1)
            found = values.gather(-1, at) == asked
            shared[second, first] = found
            # An id that is not found marks a column too many.
            where = places.gather(-1, at).masked_fill_(~found, values.shape[-1])
            marks = found.new_zeros((len(found), values.shape[-1] + 1)).scatter_(-1, where, value=True)
            shared[first, second] = marks[:, :-1]
    return shared
