"""The computation of targets from logits, by a device: a GPU through torch here, compiled code on CPUs (`capture.cpu`).

Per position, of logits z over the whole vocabulary, t = z - max z, e = exp(t) and p = e / sum e:

    logprob    t - log sum e
    top-k      exact; equal entries by rising id on a CPU, in any order on a GPU
    entropy    -sum p log p = log sum e - sum(e t) / sum e
    log_z      log sum p**(1/T) = log sum exp(t / T) - log(sum e) / T
    draws      inverse CDF: of u in [0, 1), the first id whose cumulative mass, in float64, is over u

The draws are those of `encoding.draws.draw_rows` on the same logprobs, except where u is at the edge between two ids.

Shape legend:  S rows of a block, V vocabulary size, K kept entries, N draws, U unique ids drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.cache.errors import PotstillError
from potstill.cache.types import Fields
from potstill.teacher_service.capture.layout import Drawn

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError, PotstillError)
"""Exceptions of torch and numpy where memory is short or an argument is not accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureDevice:
    """A device that computes targets from the logits in its memory."""

    head_bytes: int
    """Bytes of float32 logits that the head gives at once."""
    block_bytes: int
    """Bytes of these logits that make a block. A row with N draws counts as at least 16 N bytes, for their look-up."""
    num_threads: int
    """Blocks that are computed at one time."""
    capture_block: Callable[
        [torch.Tensor, torch.Tensor | None, Fields, NDArray[np.float64] | None, Mapping[str, torch.Tensor]],
        Drawn | None,
    ]
    """Function that fills the arrays of one block of rows and returns its draws; see `capture_with_torch`."""
    map: Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]
    """Function like the built-in `map`, to work on every block."""


def torch_device() -> CaptureDevice:
    """Set up capture on a GPU, through torch.

    Memory beside the logits and the answer: at most 8 times `head_bytes`, for t, e and a scratch copy in float32, and
    the float64 masses and their cumulative sum for draws.
    """
    size = 128 * 2**20
    # One block at a time: a GPU is kept busy by the rows of one.
    return CaptureDevice(head_bytes=size, block_bytes=size, num_threads=1, capture_block=capture_with_torch, map=map)


def one_line(error: Exception) -> str:
    """The class of a failure and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@torch.inference_mode()
def capture_with_torch(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    want: Fields,
    uniforms: NDArray[np.float64] | None,
    out: Mapping[str, torch.Tensor],
) -> Drawn | None:
    """Fill `out` for one block of rows, on any device, and return the block's draws if any are wanted.

    Not run on a GPU; tested on CPU tensors.

    Args:
        logits: [S, V] float32; entries contiguous.
        labels: [S] int64 ids whose logprob is wanted; None without a top-k.
        want: what to compute.
        uniforms: [S, N] in [0, 1), for draws.
        out: the views of `float_sections` and, with a top-k, `ids` int32, each of S rows on the CPU.
    """
    top = logits.amax(dim=1, keepdim=True)
    t = logits - top
    e = t.exp()
    log_total = e.sum(dim=1).log_()
    # NaN where the logits hold a NaN, a +inf or nothing but -inf, as t is.
    out["top"].copy_(-log_total)
    if labels is not None:
        found = torch.topk(logits, want.k, dim=1)
        out["logprobs"].copy_(_logprobs(found.values, top, log_total))
        out["ids"].copy_(found.indices)
        out["label_logprob"].copy_(_logprobs(logits.gather(1, labels[:, None]), top, log_total)[:, 0])
    if want.entropy:
        # 0 * -inf of a masked id is nothing.
        weighted = torch.linalg.vecdot(e, t.clamp(min=torch.finfo(torch.float32).min))
        out["entropy"].copy_(log_total - weighted / log_total.exp())
    for column, temperature in enumerate(want.temperatures):
        # The quotient by a small temperature is large: float64 keeps the digits that its subtraction would cost.
        power = torch.mul(t, 1.0 / temperature).exp_().sum(dim=1)
        out["log_z"][:, column].copy_(power.double().log() - log_total.double() / temperature)
    if want.dense:
        out["dense"].copy_(t.sub_(log_total[:, None]))
    if uniforms is None:
        return None
    # float64: a float32 sum over a large vocabulary would lose the ids of small mass.
    ends = e.double().cumsum_(dim=1)
    target = torch.from_numpy(uniforms).to(logits.device) * ends[:, -1:]
    # A product that rounds up to all of the mass would fall behind the last id that has any.
    target = torch.minimum(target, torch.nextafter(ends[:, -1:], torch.zeros_like(ends[:, -1:])))
    return _counted(torch.searchsorted(ends, target, right=True).clamp_(max=logits.shape[1] - 1))


def _logprobs(logits: torch.Tensor, top: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
    """Logprobs of [S, n] logits."""
    # In this order: in `top + log_total` the larger one might swallow the smaller.
    return (logits.double() - top) - log_total[:, None]


def _counted(drawn: torch.Tensor) -> Drawn:
    ordered = np.sort(drawn.to(torch.int32).cpu().numpy(), axis=1)
    first = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    at = np.flatnonzero(first)
    # A position's N draws are N neighbours, so a run ends where the next begins, be it of the next position.
    counts = np.diff(at, append=ordered.size).astype(np.int32)
    return Drawn(first.sum(axis=1, dtype=np.int64), ordered.reshape(-1)[at], counts)
