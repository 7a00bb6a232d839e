"""Sparse distillation losses: top-k + tail forward KL to several teachers, mixed with cross-entropy.

A teacher gives probabilities t_i for its top-k ids K and the mass r of everything else. The student
has p = softmax(z) and p_r, its own mass outside K. Per position, in nats:

    KL = sum_{i in K} t_i (log t_i - log p_i)  +  r (log r - log p_r)
    loss = (1 - alpha) * CE  +  alpha * sum_m weight_m * KL_m

This is the forward KL between the two distributions after merging all ids outside K into one bucket,
so it never exceeds the full KL and is zero exactly when they agree on K. Derivation of the gradient,
with log p_i = z_i - LSE(z) and log p_r = LSE_{j not in K}(z) - LSE(z), and s = sum_K t + r (1 but for rounding):

    dKL/dz_j = s p_j - t_j              j in K
             = s p_j - r p_j / p_r      otherwise

that is full distillation (p - t) from a teacher whose tail is shaped like the student's own. Renormalising
the top-k instead would teach over-confidence: Anshumann et al., "Sparse Logit Sampling", arXiv 2503.16870,
compare truncated and bucketed targets. Distillation with soft targets: Hinton et al., arXiv 1503.02531;
the mix with cross-entropy in pre-training: Peng et al., arXiv 2410.16215. Temperature is 1: at another
one a top-k says little unless the full partition function is known.

Numerics: log p_r is log(1 - sum_K p) only where the student has a tenth of its mass or more outside K; on
peaked rows that would cancel to nothing, and the logits are reduced again with K masked to -inf. A teacher's
tail under `MIN_TAIL_MASS` counts as exactly zero; its float32 top-k may sum to slightly over 1.

Memory: the gradient is analytic and recomputed in backward, chunk by chunk. Beside the logits and their
gradient (in the logits' dtype) at most three [chunk, V] float32 arrays live at once.

Shape legend:  B rows, T tokens, N positions (B * T flattened), K kept ids, V student vocabulary, M teachers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.cache.errors import InvalidInput

NO_LABEL = -100
"""The label of a position that has none; torch's own convention."""

MIN_TAIL_MASS = 1e-6
"""A teacher's tail below this mass is float32 rounding of the top-k and counts as zero."""

_PEAKED = 0.9
"""Student mass on K over which its tail is reduced from the logits instead of taken from 1."""

_LOST = 20.0
"""log(1 / p_r) over which p_j / p_r is taken from the logits instead of from p_j."""

_CHUNK_ELEMENTS = 1 << 24
"""Default [chunk, V] size: 16M float32, 64 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTargets:
    """One teacher's targets for a batch of positions.

    Ids at or over the student's vocabulary are not an error: their mass joins the tail.
    """

    ids: Tensor
    """[..., K] integer token ids; any order, no repeats."""
    logprobs: Tensor
    """[..., K] float, nats; -inf contributes nothing."""
    log_tail: Tensor
    """[...] float, log of the mass outside `ids`; -inf for none."""
    weight: float = 1.0
    """Weight of this teacher's KL; the loss does not normalise weights."""

    def each(self, change: Callable[[Tensor], Tensor]) -> TeacherTargets:
        """Apply `change` to every tensor, as to slice the position axes or to move it to a device."""
        return TeacherTargets(change(self.ids), change(self.logprobs), change(self.log_tail), self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """The loss of one call and its parts. Only `total` carries a gradient."""

    total: Tensor
    """[] the mixed loss over the given counts, in the logits' compute dtype."""
    ce_sum: Tensor
    """[] float64, nats, summed over labelled positions, not divided."""
    kl_sums: Tensor
    """[M] float64, nats, summed over masked-in positions, not divided, not weighted."""


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teachers: Sequence[TeacherTargets] = (),
    *,
    alpha: float,
    mask: Tensor,
    num_labels: float,
    num_positions: float,
    chunk_positions: int | None = None,
) -> Loss:
    """`(1 - alpha) * CE / num_labels + alpha * sum_m weight_m * KL_m / num_positions`, with its gradient.

    `logits[t]` predict the token after token t, and so do the teachers' targets t: they align one to one.
    A row of T tokens has T - 1 labels, because the last token has no successor, and T targets. The two
    counts are of the *global* batch, over all micro-batches and ranks: then summing the returned losses
    (and gradients) of the pieces gives those of the whole.

    Args:
        logits: [B, T, V] or [N, V] float; chunks are computed in float32, or float64 for float64 logits.
        labels: [B, T] or [N] int64, `NO_LABEL` where there is none.
        teachers: targets shaped like `labels`, with one more axis K for ids and logprobs.
        alpha: share of the KL, in [0, 1]; at 0 the teachers are only measured.
        mask: bool, shaped like `labels`; False (padding) excludes a position from everything.
        num_labels: labelled positions of the global batch.
        num_positions: masked-in positions of the global batch.
        chunk_positions: positions computed at once; by default as many as fit 64 MiB of float32.

    Raises:
        InvalidInput: alpha outside [0, 1] or shapes that do not agree.
    """
    _check(logits, labels, teachers, alpha, mask)
    vocab = logits.shape[-1]
    flat_mask = mask.reshape(-1)
    flat = _Flat(
        labels=torch.where(flat_mask, labels.reshape(-1), NO_LABEL),
        mask=flat_mask,
        teachers=[teacher.each(lambda tensor: tensor.flatten(0, mask.ndim - 1)) for teacher in teachers],
        ce_scale=(1.0 - alpha) / max(num_labels, 1),
        kl_scale=alpha / max(num_positions, 1),
        chunk=chunk_positions or max(1, _CHUNK_ELEMENTS // vocab),
    )
    total, ce_sum, kl_sums = _SparseDistillation.apply(logits.reshape(-1, vocab), flat)  # type: ignore[no-untyped-call]
    return Loss(total, ce_sum, kl_sums)


def kl_and_overlap(logits: Tensor, teacher: TeacherTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Measure each position, without gradient: KL to the teacher, agreement and the student's mass on its top-k.

    Args:
        logits: [N, V] float.
        teacher: targets of N positions.

    Returns:
        KL [N] float32 nats; bool [N], true where both have the same most likely id; the student's mass on the
        teacher's top-k, float32 [N].
    """
    with torch.no_grad():
        z = logits.to(_compute_dtype(logits))
        lse = torch.logsumexp(z, dim=-1)
        target = _Chunk.of(teacher, slice(None), z)
        kl, _ = target.kl(z, lse)
        mass = torch.exp(target.gather(z) - lse[:, None]).masked_fill(~target.inside, 0.0).sum(dim=-1)
        best = teacher.ids.gather(-1, teacher.logprobs.argmax(dim=-1, keepdim=True)).squeeze(-1)
        return kl, z.argmax(dim=-1) == best, mass.clamp(max=1.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """Everything but the logits, flat on the position axis."""

    labels: Tensor
    mask: Tensor
    teachers: list[TeacherTargets]
    ce_scale: float
    kl_scale: float
    chunk: int

    def slices(self) -> Iterator[slice]:
        num_positions = self.labels.shape[0]
        for start in range(0, num_positions, self.chunk):
            yield slice(start, min(start + self.chunk, num_positions))


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """One teacher's targets for n positions, in the compute dtype, folded to the student's vocabulary."""

    ids: Tensor  # [n, K] int64; V for ids outside the vocabulary
    inside: Tensor  # [n, K] bool
    logprobs: Tensor  # [n, K]; -inf where not inside
    t: Tensor  # [n, K] = exp(logprobs)
    log_r: Tensor  # [n]; -inf for a tail of zero
    r: Tensor  # [n]

    @classmethod
    def of(cls, teacher: TeacherTargets, part: slice, z: Tensor) -> _Chunk:
        vocab = z.shape[-1]
        ids = teacher.ids[part].long()  # gather and scatter take int64 only
        # An id that the student does not have cannot be taught; its mass joins the tail, so that the sum stays 1.
        logprobs = teacher.logprobs[part].to(z.dtype)
        inside = ids < vocab
        outside = logprobs.masked_fill(inside, -math.inf)
        log_r = torch.logaddexp(teacher.log_tail[part].to(z.dtype), torch.logsumexp(outside, dim=-1))
        log_r = log_r.masked_fill(log_r < math.log(MIN_TAIL_MASS), -math.inf)
        logprobs = logprobs.masked_fill(~inside, -math.inf)
        return cls(ids.clamp(max=vocab), inside, logprobs, logprobs.exp(), log_r, log_r.exp())

    def gather(self, z: Tensor) -> Tensor:
        """[n, K] logits of the kept ids; those outside the vocabulary give some finite value."""
        return z.gather(-1, self.ids.clamp(max=z.shape[-1] - 1))

    def tail_lse(self, z: Tensor, lse: Tensor, log_p: Tensor) -> Tensor:
        """[n] log-sum-exp of the logits outside K; -inf when K covers the vocabulary."""
        kept = log_p.exp().masked_fill(~self.inside, 0.0).sum(dim=-1)
        lse_tail = lse + torch.log1p(-kept.clamp(max=_PEAKED))
        # There 1 - kept has lost its digits, so the logits outside K are summed again; only such rows pay for a copy.
        peaked = (kept > _PEAKED).nonzero().squeeze(-1)
        if len(peaked):
            outside = _fill(z[peaked], self.ids[peaked], -math.inf)
            lse_tail[peaked] = torch.logsumexp(outside, dim=-1)
        return lse_tail

    def sub_tail(self, grad: Tensor, *, z: Tensor, p: Tensor, lse: Tensor, lse_tail: Tensor, scale: Tensor) -> None:
        """grad[n, V] -= scale * p_j / p_r outside K, given p = softmax(z)."""
        # Where no id is outside K, `scale` is 0; the factor must be finite all the same, as 0 * inf is NaN.
        log_factor = lse - lse_tail.masked_fill(lse_tail == -math.inf, 0.0)
        tail = p * (scale * torch.exp(log_factor.clamp(max=_LOST)))[:, None]
        # Where p_r is so small that p_j has lost its digits, start from the logits again.
        lost = ((log_factor > _LOST) & (lse_tail > -math.inf)).nonzero().squeeze(-1)
        if len(lost):
            tail[lost] = torch.exp(z[lost] - lse_tail[lost, None]) * scale[lost, None]
        grad.sub_(_fill(tail, self.ids, 0.0))

    def kl(self, z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """KL [n], and the tail's log-sum-exp [n]."""
        log_p = self.gather(z) - lse[:, None]
        # A padded or absent id has t = 0 and logprob -inf, whose product is NaN.
        kept = torch.where(self.t > 0, self.t * (self.logprobs - log_p), 0.0).sum(dim=-1)
        lse_tail = self.tail_lse(z, lse, log_p)
        # Where K covers the whole vocabulary, a tail has nowhere to go and cannot be learnt: it is dropped.
        live = (self.r > 0) & (lse_tail > -math.inf)
        tail = torch.where(live, self.r * (self.log_r - (lse_tail - lse)), 0.0)
        return kept + tail, lse_tail


def _fill(values: Tensor, ids: Tensor, value: float) -> Tensor:
    """[n, V] `values` with `value` at `ids`; may write to `values`. An id of V is one the student does not have."""
    if bool((ids < values.shape[-1]).all()):
        return values.scatter_(-1, ids, value)
    # One spare column takes the writes of the ids that are not there.
    padded = torch.cat([values, values.new_zeros((values.shape[0], 1))], dim=-1)
    return padded.scatter_(-1, ids, value)[:, :-1]


class _SparseDistillation(torch.autograd.Function):
    """Forward by chunks, backward by chunks: no [N, V] array in float32 is ever kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, flat: _Flat) -> tuple[Tensor, Tensor, Tensor]:
        num_positions, num_teachers = logits.shape[0], len(flat.teachers)
        dtype = _compute_dtype(logits)
        lse = logits.new_empty(num_positions, dtype=dtype)
        lse_tails = logits.new_empty((num_teachers, num_positions), dtype=dtype)
        ce_sum = logits.new_zeros((), dtype=torch.float64)
        kl_sums = logits.new_zeros(num_teachers, dtype=torch.float64)
        for part in flat.slices():
            z = logits[part].to(dtype)
            lse[part] = torch.logsumexp(z, dim=-1)
            ce_sum += _cross_entropy(z, lse[part], flat.labels[part]).sum(dtype=torch.float64)
            for m, teacher in enumerate(flat.teachers):
                kl, lse_tails[m, part] = _Chunk.of(teacher, part, z).kl(z, lse[part])
                kl_sums[m] += torch.where(flat.mask[part], kl, 0.0).sum(dtype=torch.float64)
        weights = kl_sums.new_tensor([teacher.weight for teacher in flat.teachers])
        # A term of scale 0 is left out: an infinite KL or CE that is only measured must not make the loss NaN.
        total = flat.kl_scale * (weights * kl_sums).sum() if flat.kl_scale else kl_sums.new_zeros(())
        if flat.ce_scale:
            total = total + flat.ce_scale * ce_sum
        # Two numbers a position are kept, and the [chunk, V] arrays are computed again from the logits in backward.
        ctx.save_for_backward(logits, lse, lse_tails)
        ctx.flat = flat
        ctx.mark_non_differentiable(ce_sum, kl_sums)
        return total.to(dtype), ce_sum, kl_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, lse, lse_tails = ctx.saved_tensors
        flat: _Flat = ctx.flat
        grad = torch.empty_like(logits)
        for part in flat.slices():
            z = logits[part].to(lse.dtype)
            grad[part] = _gradient(z, lse[part], lse_tails[:, part], flat, part).mul_(grad_total)
        return grad, None


def _gradient(z: Tensor, lse: Tensor, lse_tails: Tensor, flat: _Flat, part: slice) -> Tensor:
    """[n, V] d total / d z of one chunk, by the formula at the top of this file."""
    labels, mask = flat.labels[part], flat.mask[part].to(z.dtype)
    label_scale = flat.ce_scale * (labels != NO_LABEL).to(z.dtype)
    p_scale = label_scale.clone()
    p = (z - lse[:, None]).exp_()  # in place, here and below: each [chunk, V] array saved is memory for a larger batch
    grad = torch.zeros_like(z)
    grad.scatter_(-1, labels.clamp(min=0)[:, None], -label_scale[:, None])
    for teacher, lse_tail in zip(flat.teachers if flat.kl_scale else (), lse_tails, strict=False):
        target = _Chunk.of(teacher, part, z)
        r = torch.where(lse_tail > -math.inf, target.r, 0.0)  # no tail is learnt where no id is outside K
        scale = flat.kl_scale * teacher.weight * mask
        p_scale += scale * (target.t.sum(dim=-1) + r)
        target.sub_tail(grad, z=z, p=p, lse=lse, lse_tail=lse_tail, scale=scale * r)
        # Ids outside the vocabulary have t = 0, and add nothing to the last id that they are clamped to.
        kept = -(scale[:, None] * target.t)
        grad.scatter_add_(-1, target.ids.clamp(max=z.shape[-1] - 1), kept)
    return grad.add_(p.mul_(p_scale[:, None]))


def _cross_entropy(z: Tensor, lse: Tensor, labels: Tensor) -> Tensor:
    """[n] nats; 0 where there is no label."""
    # gather refuses an index of NO_LABEL, even where its result is not used.
    chosen = z.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(labels != NO_LABEL, lse - chosen, 0.0)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, labels: Tensor, teachers: Sequence[TeacherTargets], alpha: float, mask: Tensor) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise InvalidInput(f"alpha is {alpha!r}; it must be in [0, 1]")
    positions = labels.shape
    if logits.shape[:-1] != positions or mask.shape != positions:
        raise InvalidInput(
            f"logits {list(logits.shape)}, labels {list(positions)} and mask {list(mask.shape)} do not agree"
        )
    for m, t in enumerate(teachers):
        if t.log_tail.shape != positions or t.ids.shape[:-1] != positions or t.logprobs.shape != t.ids.shape:
            raise InvalidInput(
                f"teacher {m}: ids {list(t.ids.shape)}, logprobs {list(t.logprobs.shape)} and log_tail "
                f"{list(t.log_tail.shape)} do not fit labels {list(positions)}"
            )
