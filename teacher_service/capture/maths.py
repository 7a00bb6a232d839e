"""From logits to everything a target holds.

Per position, of logits z over the whole vocabulary, t = z - max z, e = exp(t) and p = e / sum e:

    logprob    t - log sum e
    top-k      exact; equal entries by rising id on a CPU, in any order on a GPU
    entropy    -sum p log p = log sum e - sum(e t) / sum e
    log_z      log sum p**(1/T) = log sum exp(t / T) - log(sum e) / T
    draws      inverse CDF: of u in [0, 1), the first id whose cumulative mass, in float64, is over u

The draws are those of `encoding.draws.draw_rows` on the same logprobs, but for a u at the very edge between two ids.

On a CPU a compiled sweep of each row does all of it (`capture_kernel`), elsewhere torch does.

Memory beside the logits and the answer: on a CPU 2 V float32 and the block's draws, 4 N float32 a row, for each thread;
elsewhere MEMORY_COPIES times what is handed in at once, which counts as 4 N float32 a row where that is more than V.

Shape legend:  S rows of a block, V vocabulary size, K kept entries, N draws, U unique ids drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.cache.types import Fields
from potstill.teacher_service.capture.layout import Drawn

BLOCK_BYTES = 8 * 2**20
"""float32 logits that a thread works on at once on a CPU."""
MEMORY_COPIES = 8
"""Of what is handed in at once on a GPU, at most: t, e and a scratch copy in float32, and the float64 masses and their
cumulative sum for draws."""


def rows_at_once(vocab_size: int, num_draws: int, block_bytes: int) -> int:
    """Rows of a block; what is looked up for many draws counts as much as logits do."""
    return max(1, block_bytes // (4 * max(vocab_size, 4 * num_draws)))


@torch.inference_mode()
def capture_block(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    want: Fields,
    uniforms: NDArray[np.float64] | None,
    out: Mapping[str, torch.Tensor],
) -> Drawn | None:
    """Fill `out` for one block of rows; the draws of the block, if any are wanted.

    Args:
        logits: [S, V] of any floating type; entries beside each other.
        labels: [S] int64 ids whose logprob is wanted; None without a top-k.
        want: what to compute.
        uniforms: [S, N] in [0, 1), for draws.
        out: the views of `float_sections` and, with a top-k, `ids` int32, each of S rows on the CPU.
    """
    assert (labels is not None) == (want.k > 0), "labels belong to the top-k"
    assert (uniforms is not None) == (want.draws > 0), "uniforms belong to draws"
    how = capture_on_cpu if logits.is_cpu else capture_on_gpu
    return how(logits.float(), labels, want, uniforms, out)


def capture_on_cpu(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    want: Fields,
    uniforms: NDArray[np.float64] | None,
    out: Mapping[str, torch.Tensor],
) -> Drawn | None:
    """`capture_block` of float32 logits on a CPU, in this thread alone."""
    # While it starts, vLLM stumbles over numba where that was loaded before (`vllm_engine`).
    from potstill.teacher_service.capture.kernel import Extras, TopK, fill  # noqa: PLC0415

    num_rows, vocab_size = logits.shape
    nothing = np.empty(0, np.float32)
    top_k = TopK(
        ids=out["ids"].numpy() if want.k else np.empty((num_rows, 0), np.int32),
        logprobs=out["logprobs"].numpy() if want.k else np.empty((num_rows, 0), np.float32),
        labels=np.empty(0, np.int64) if labels is None else labels.numpy(),
        label_logprob=out["label_logprob"].numpy() if want.k else nothing,
    )
    extras = Extras(
        entropy=out["entropy"].numpy() if want.entropy else nothing,
        temperatures=np.array(want.temperatures, np.float64),
        log_z=out["log_z"].numpy() if want.temperatures else np.empty((num_rows, 0), np.float32),
        dense=out["dense"].numpy() if want.dense else np.empty((0, vocab_size), np.float32),
        uniforms=np.empty((num_rows, 0)) if uniforms is None else np.sort(uniforms, axis=1),
    )
    drawn = fill(logits.numpy(), out["top"].numpy(), top_k, extras)
    return None if uniforms is None else drawn


def capture_on_gpu(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    want: Fields,
    uniforms: NDArray[np.float64] | None,
    out: Mapping[str, torch.Tensor],
) -> Drawn | None:
    """`capture_block` of float32 logits on any device. Not run on a GPU; tested on CPU tensors."""
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
        power = torch.mul(t, 1.0 / temperature).exp_().sum(dim=1)
        out["log_z"][:, column].copy_(power.double().log() - log_total.double() / temperature)
    if want.dense:
        out["dense"].copy_(t.sub_(log_total[:, None]))
    if uniforms is None:
        return None
    ends = e.double().cumsum_(dim=1)
    target = torch.from_numpy(uniforms).to(logits.device) * ends[:, -1:]
    # A product that rounds up to all of the mass would fall behind the last id that has any.
    target = torch.minimum(target, torch.nextafter(ends[:, -1:], torch.zeros_like(ends[:, -1:])))
    return _counted(torch.searchsorted(ends, target, right=True).clamp_(max=logits.shape[1] - 1))


def _logprobs(logits: torch.Tensor, top: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
    """Of [S, n] logits, in this order: the sum of the two that are taken off might swallow one of them."""
    return (logits.double() - top) - log_total[:, None]


def _counted(drawn: torch.Tensor) -> Drawn:
    ordered = np.sort(drawn.to(torch.int32).cpu().numpy(), axis=1)
    first = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    at = np.flatnonzero(first)
    # A position's N draws are N neighbours, so a run ends where the next begins, be it of the next position.
    counts = np.diff(at, append=ordered.size).astype(np.int32)
    return Drawn(first.sum(axis=1, dtype=np.int64), ordered.reshape(-1)[at], counts)
