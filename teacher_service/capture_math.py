"""From logits to everything a target holds, in blocks of rows that stay in a CPU's cache. Plain torch.

Per position, of logits z over the whole vocabulary and p = softmax(z):

    top-k      exact: the k-th largest of the maxima of 32 interleaved parts is no more than the k-th largest entry, so
               what is at or above it holds the top-k; that is about k entries, which alone are sorted
    entropy    -sum p log p
    log_z      log sum p**(1/T) = logsumexp(log p / T)
    draws      inverse CDF: of u in [0, 1), the first id whose cumulative mass is over u. In float64, and in two
               steps: over the masses of blocks of 64 ids, then inside the block that was hit

The draws are those of `cache.draws.draw_rows` on the same logprobs, but for a u at the very edge between two ids.

Memory beside the logits and the answer: MEMORY_COPIES times what is handed in at once, which counts as 4 N float32 a
row where that is more than V.

Shape legend:  R rows handed in, S rows of a block, V vocabulary size, K kept entries, N draws.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from cache.types import Fields

BLOCK_BYTES = 2 * 2**20
"""float32 logits that are worked on at once on a CPU: a few times a core's second cache."""
MEMORY_COPIES = 8
"""Of what is handed in at once, at most: logprobs, masses, one scratch, and of draws one more in float32 and two in
float64."""

_PARTS = 32
"""Interleaved parts of the vocabulary, whose elementwise maximum bounds the k-th largest entry from below."""
_DRAW_BLOCK = 64
"""Ids whose mass is summed before draws are looked up; one index_select row."""

Drawn = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]
"""[S] unique ids a position, [U] ids rising within a position, [U] counts."""


def rows_at_once(vocab_size: int, num_draws: int, block_bytes: int) -> int:
    """Rows of a block; what is looked up for many draws counts as much as logits do."""
    return max(1, block_bytes // (4 * max(vocab_size, 4 * num_draws)))


class Workspace(threading.local):
    """Memory that a thread uses again and again: fresh pages of a block cost more than the arithmetic on it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, on the device of `like`; it is the same memory for the same name."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size or buffer.device != like.device:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[:size].view(shape)


@torch.inference_mode()
def capture_block(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    want: Fields,
    uniforms: NDArray[np.float64] | None,
    out: Mapping[str, torch.Tensor],
    space: Workspace,
) -> Drawn | None:
    """Fill `out` for one block of rows; the draws of the block, if any are wanted.

    Args:
        logits: [S, V] of any floating type.
        labels: [S] int64 ids whose logprob is wanted; None without a top-k.
        want: what to compute.
        uniforms: [S, N] in [0, 1), for draws.
        out: the views of `float_sections` and, with a top-k, `ids` int32, each of S rows on the CPU.
        space: what is worked in.
    """
    shape = (logits.shape[0], logits.shape[1])
    logprobs = space.take("logprobs", shape, logits, torch.float32)
    torch.log_softmax(logits.float(), dim=-1, out=logprobs)
    if want.k:
        assert labels is not None, "labels belong to the top-k"
        values, ids = _top_k(logprobs, want.k)
        out["logprobs"].copy_(values)
        out["ids"].copy_(ids)
        out["label_logprob"].copy_(logprobs.gather(1, labels[:, None])[:, 0])
        top = values[:, 0]
    else:
        top = logprobs.amax(dim=-1)
    out["top"].copy_(top)
    if want.dense:
        out["dense"].copy_(logprobs)
    if not (want.entropy or want.draws or want.temperatures):
        return None
    mass = _exp(logprobs, out=space.take("mass", shape, logits, torch.float32))
    if want.entropy:
        out["entropy"].copy_(_entropy(mass, logprobs))
    for column, temperature in enumerate(want.temperatures):
        scratch = space.take("scratch", shape, logits, torch.float32)
        out["log_z"][:, column].copy_(_log_z(mass, logprobs, top, temperature, scratch))
    return _draw(mass, uniforms, space) if uniforms is not None else None


def _top_k(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, K] values and ids by falling value."""
    num_rows, vocab_size = logprobs.shape
    width = vocab_size // _PARTS
    # torch's own is fast on a GPU, and where the bound would not leave out much.
    if logprobs.is_cuda or width < 4 * k:
        found = torch.topk(logprobs, k, dim=-1)
        return found.values, found.indices
    values = logprobs.numpy()
    maxima = logprobs[:, : width * _PARTS].view(num_rows, _PARTS, width).amax(dim=1).numpy()
    bound = np.partition(maxima, width - k, axis=1)[:, width - k]
    flat = _at_least(values, maxima, bound)
    rows = flat // vocab_size
    counts = np.bincount(rows, minlength=num_rows)
    if counts.min() < k or counts.max() > 8 * k:  # NaN, or as many equal entries as make the bound useless
        found = torch.topk(logprobs, k, dim=-1)
        return found.values, found.indices
    return _sorted(values, flat, rows, counts, k)


def _at_least(
    values: NDArray[np.float32], maxima: NDArray[np.float32], bound: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Rising flat indices of [S, V] `values` that are at or above their row's [S] bound, by [S, V // 32] maxima."""
    vocab_size, width = values.shape[1], maxima.shape[1]
    hit = np.flatnonzero(maxima >= bound[:, None])
    row = hit // width
    first = hit + row * (vocab_size - width)
    columns = first[:, None] + np.arange(_PARTS) * width
    flat = columns[values.reshape(-1)[columns] >= bound[row, None]]
    # What is left of the vocabulary behind 32 parts of equal width.
    rest = np.flatnonzero(values[:, width * _PARTS :] >= bound[:, None])
    if len(rest):
        left = vocab_size - width * _PARTS
        flat = np.concatenate([flat, rest + (rest // left + 1) * width * _PARTS])
    return np.sort(flat)


def _sorted(
    logprobs: NDArray[np.float32], flat: NDArray[np.int64], rows: NDArray[np.int64], counts: NDArray[np.int64], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `k` of each row's `counts` candidates at `flat`; ties by rising id."""
    columns = np.arange(len(flat)) - (np.cumsum(counts) - counts)[rows]
    values = np.full((len(counts), counts.max()), np.inf, np.float32)
    ids = np.zeros(values.shape, np.int32)
    values[rows, columns] = -logprobs.reshape(-1)[flat]
    ids[rows, columns] = flat - rows * logprobs.shape[1]
    order = np.argsort(values, axis=1, kind="stable")[:, :k]
    taken = np.take_along_axis(values, order, axis=1)
    return torch.from_numpy(np.negative(taken, out=taken)), torch.from_numpy(np.take_along_axis(ids, order, axis=1))


def _log_z(
    mass: torch.Tensor, logprobs: torch.Tensor, top: torch.Tensor, temperature: float, scratch: torch.Tensor
) -> torch.Tensor:
    """[S] float64; the two usual temperatures take no exponential."""
    shift = torch.zeros_like(top)
    if temperature == 0.5:
        total = torch.linalg.vecdot(mass, mass)
    elif temperature == 2.0:
        total = torch.sqrt(mass, out=scratch).sum(dim=-1)
    else:
        shift = top  # by the largest entry, so that a low temperature does not underflow
        torch.sub(logprobs, top[:, None], out=scratch).mul_(1.0 / temperature)
        total = _exp(scratch, out=scratch).sum(dim=-1)
    log_z: torch.Tensor = total.double().log() + shift.double() / temperature
    return log_z


def _exp(values: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """On a CPU numpy's takes half the time of torch's."""
    if values.is_cpu:
        np.exp(values.numpy(), out=out.numpy())
        return out
    return torch.exp(values, out=out)


def _entropy(mass: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """[S] nats."""
    entropy: torch.Tensor = -torch.linalg.vecdot(mass, logprobs)
    if not torch.isfinite(entropy).all():
        # 0 * -inf of a masked id; a row that is NaN itself stays NaN, as its masses are.
        entropy = -torch.linalg.vecdot(mass, logprobs.clamp(min=torch.finfo(torch.float32).min))
    return entropy


def _draw(mass: torch.Tensor, uniforms: NDArray[np.float64], space: Workspace) -> Drawn:
    where = torch.from_numpy(uniforms).to(mass.device)
    few = where.shape[1] * _DRAW_BLOCK < mass.shape[1]
    drawn = _draw_in_blocks(mass, where, space) if few else _draw_in_rows(mass, where, space)
    ordered = np.sort(drawn.to(torch.int32).cpu().numpy(), axis=1)
    first = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    at = np.flatnonzero(first)
    # A position's N draws are N neighbours, so a run ends where the next begins, be it of the next position.
    counts = np.diff(at, append=ordered.size).astype(np.int32)
    return first.sum(axis=1, dtype=np.int64), ordered.reshape(-1)[at], counts


def _draw_in_blocks(mass: torch.Tensor, where: torch.Tensor, space: Workspace) -> torch.Tensor:
    """[S, N] ids, for few draws: only blocks that are hit are summed up id by id."""
    num_rows, vocab_size = mass.shape
    num_blocks = -(-vocab_size // _DRAW_BLOCK)
    if num_blocks * _DRAW_BLOCK > vocab_size:
        padded = space.take("scratch", (num_rows, num_blocks * _DRAW_BLOCK), mass, torch.float32)
        padded[:, :vocab_size] = mass
        padded[:, vocab_size:] = 0
        mass = padded
    blocks = mass.view(-1, _DRAW_BLOCK)
    ends = blocks.sum(dim=-1).double().view(num_rows, num_blocks).cumsum(dim=-1)
    target = _within(where * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True).clamp_(max=num_blocks - 1)
    starts = torch.nn.functional.pad(ends, (1, 0))
    begin, end = starts.gather(1, block), starts.gather(1, block + 1)
    hit = (torch.arange(num_rows, device=mass.device)[:, None] * num_blocks + block).view(-1)
    found = space.take("found", (len(hit), _DRAW_BLOCK), mass, torch.float32)
    inside = space.take("sums", (len(hit), _DRAW_BLOCK), mass, torch.float64)
    inside.copy_(torch.index_select(blocks, 0, hit, out=found)).cumsum_(dim=-1)
    # The float32 sum of a block and the float64 one of its ids differ by rounding: the same share of both is meant.
    share = ((target - begin) / (end - begin)).view(-1, 1)
    offset = torch.searchsorted(inside, _within(share * inside[:, -1:], inside[:, -1:]), right=True)
    drawn: torch.Tensor = block * _DRAW_BLOCK + offset.view_as(block)
    return drawn.clamp_(max=vocab_size - 1)


def _draw_in_rows(mass: torch.Tensor, where: torch.Tensor, space: Workspace) -> torch.Tensor:
    """[S, N] ids, for many draws."""
    ends = space.take("sums", (mass.shape[0], mass.shape[1]), mass, torch.float64)
    ends.copy_(mass).cumsum_(dim=-1)
    drawn: torch.Tensor = torch.searchsorted(ends, _within(where * ends[:, -1:], ends[:, -1:]), right=True)
    return drawn.clamp_(max=mass.shape[1] - 1)


def _within(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A product that rounds up to all of the mass would fall behind the last id that has any."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
