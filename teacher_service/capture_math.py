"""From logits to everything a target holds, in one sweep over the vocabulary. Plain torch.

Per position, of logits z over the whole vocabulary, t = z - max z, e = exp(t) and p = e / sum e:

    logprob    t - log sum e, taken only where it is wanted
    top-k      exact: the k-th largest of the maxima of 32 interleaved parts is no more than the k-th largest entry, so
               what is at or above it holds the top-k; that is about k entries, which alone are sorted
    entropy    -sum p log p = log sum e - sum(e t) / sum e
    log_z      log sum p**(1/T) = log sum exp(t / T) - log(sum e) / T
    draws      inverse CDF: of u in [0, 1), the first id whose cumulative mass is over u. In float64, and in two
               steps: over the masses of blocks of 64 ids, then inside the block that was hit

The draws are those of `cache.draws.draw_rows` on the same logprobs, but for a u at the very edge between two ids.

t and e exist for a strip of few rows at a time, while these are in a cache; what is left of a row is its sums. A block
has several strips, as the steps after the sweep cost by the call.

Memory beside the logits and the answer: MEMORY_COPIES times what is handed in at once, which counts as 4 N float32 a
row where that is more than V.

Shape legend:  S rows of a block, R rows of a strip, V vocabulary size, K kept entries, N draws, B blocks of 64 ids.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache.types import Fields

BLOCK_BYTES = 8 * 2**20
"""float32 logits that a thread works on at once on a CPU."""
MEMORY_COPIES = 8
"""Of what is handed in at once, at most: one in float32 and one with blocks of 64 ids of it, three for what is looked
up for draws, and three for the strips of a GPU, where a strip is all."""

_STRIP_BYTES = 2 * 2**20
"""float32 logits that are swept at once on a CPU: smaller strips cost more by their calls than they save in caches."""
_PARTS = 32
"""Interleaved parts of the vocabulary, whose elementwise maximum bounds the k-th largest entry from below."""
_DRAW_BLOCK = 64
"""Ids whose mass is summed before draws are looked up; vLLM pads a vocabulary to a multiple of it."""

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
        logits: [S, V] of any floating type; entries beside each other.
        labels: [S] int64 ids whose logprob is wanted; None without a top-k.
        want: what to compute.
        uniforms: [S, N] in [0, 1), for draws.
        out: the views of `float_sections` and, with a top-k, `ids` int32, each of S rows on the CPU.
        space: what is worked in.
    """
    logits = logits.float()
    if want.only_top_k:
        assert labels is not None, "labels belong to the top-k"
        _fill_top_k(logits, labels, want.k, out, space)
        return None
    where = None if uniforms is None else torch.from_numpy(uniforms).to(logits.device)
    sums = _sweep(logits, want, where, out.get("dense"), space)
    log_total = sums.log_total
    # NaN where the logits hold a NaN, a +inf or nothing but -inf, as t is.
    out["top"].copy_(-log_total)
    if want.k:
        assert labels is not None, "labels belong to the top-k"
        values, ids = _top_k(logits, sums.maxima, want.k)
        out["logprobs"].copy_(_logprobs(values, sums.top, log_total))
        out["ids"].copy_(ids)
        out["label_logprob"].copy_(_logprobs(logits.gather(1, labels[:, None]), sums.top, log_total)[:, 0])
    if want.entropy:
        out["entropy"].copy_(log_total - sums.weighted / log_total.exp())
    for column, temperature in enumerate(want.temperatures):
        out["log_z"][:, column].copy_(sums.powers[:, column].double().log() - log_total.double() / temperature)
    if where is None:
        return None
    return _counted(_look_up(logits, sums, where, space) if sums.drawn is None else sums.drawn)


def _fill_top_k(
    logits: torch.Tensor, labels: torch.Tensor, k: int, out: Mapping[str, torch.Tensor], space: Workspace
) -> None:
    """Where nothing else is wanted, torch's own log-softmax of a strip is less than its sums."""
    vocab_size = logits.shape[1]
    for rows in _strips(logits):
        shape = (rows.stop - rows.start, vocab_size)
        logprobs = torch.log_softmax(logits[rows], dim=1, out=space.take("t", shape, logits, torch.float32))
        maxima = space.take("maxima", (shape[0], vocab_size // _PARTS), logits, torch.float32)
        out["top"][rows].copy_(_top(logprobs, maxima))
        values, ids = _top_k(logprobs, maxima, k)
        out["logprobs"][rows].copy_(values)
        out["ids"][rows].copy_(ids)
        out["label_logprob"][rows].copy_(logprobs.gather(1, labels[rows, None])[:, 0])


def _strips(logits: torch.Tensor) -> list[slice]:
    """Rows that are swept at once: on a GPU all."""
    num_rows, vocab_size = logits.shape
    step = max(1, _STRIP_BYTES // (4 * vocab_size)) if logits.is_cpu else max(1, num_rows)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _logprobs(logits: torch.Tensor, top: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
    """Of [S, n] logits, which are overwritten; in the order of `torch.log_softmax`."""
    return logits.sub_(top[:, None]).sub_(log_total[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """What the sweep leaves of S rows; float32."""

    maxima: torch.Tensor
    """[S, V // 32] the largest z of each interleaved part; what is left of the vocabulary behind them is in none."""
    top: torch.Tensor
    """[S] max z."""
    log_total: torch.Tensor
    """[S] log sum e."""
    weighted: torch.Tensor
    """[S] sum e t, for the entropy."""
    powers: torch.Tensor
    """[S, temperatures] sum exp(t / T)."""
    blocks: torch.Tensor
    """[S, B] sum e of each block of ids, for few draws."""
    drawn: torch.Tensor | None
    """[S, N] int64 ids of many draws, which the sweep itself looks up."""

    @classmethod
    def empty(cls, logits: torch.Tensor, want: Fields) -> _Sums:
        num_rows, vocab_size = logits.shape
        many = _many(want.draws, vocab_size)
        return cls(
            maxima=logits.new_empty((num_rows, vocab_size // _PARTS)),
            top=logits.new_empty(num_rows),
            log_total=logits.new_empty(num_rows),
            weighted=logits.new_empty(num_rows),
            powers=logits.new_empty((num_rows, len(want.temperatures))),
            blocks=logits.new_empty((num_rows, _num_blocks(vocab_size) if want.draws and not many else 0)),
            drawn=logits.new_empty((num_rows, want.draws), dtype=torch.int64) if many else None,
        )


def _many(num_draws: int, vocab_size: int) -> bool:
    """Whether summing up all ids costs less than summing up the blocks that are hit."""
    return num_draws * _DRAW_BLOCK >= vocab_size


def _num_blocks(vocab_size: int) -> int:
    return -(-vocab_size // _DRAW_BLOCK)


def _sweep(
    logits: torch.Tensor, want: Fields, where: torch.Tensor | None, dense: torch.Tensor | None, space: Workspace
) -> _Sums:
    """Each strip is read once; `dense` gets its logprobs."""
    vocab_size = logits.shape[1]
    sums = _Sums.empty(logits, want)
    strips = _strips(logits)
    width = _num_blocks(vocab_size) * _DRAW_BLOCK
    padded = space.take("e", (strips[0].stop, width), logits, torch.float32)
    padded[:, vocab_size:] = 0
    keeps_t = want.entropy or dense is not None or not {0.5, 2.0}.issuperset(want.temperatures)
    # Where only e is wanted t becomes e in place, so that more rows stay in the cache.
    whole = space.take("t", (strips[0].stop, vocab_size), logits, torch.float32) if keeps_t else padded[:, :vocab_size]
    for rows in strips:
        t, masses = whole[: rows.stop - rows.start], padded[: rows.stop - rows.start]
        e = masses[:, :vocab_size]
        top = sums.top[rows] = _top(logits[rows], sums.maxima[rows])
        torch.sub(logits[rows], top[:, None], out=t)
        _powers(t, e, want.temperatures, sums.powers[rows], space)
        log_total = sums.log_total[rows] = e.sum(dim=1).log_()
        if want.entropy:
            sums.weighted[rows] = _weighted(e, t)
        if dense is not None:
            dense[rows].copy_(t.sub_(log_total[:, None]))
        if sums.drawn is not None and where is not None:
            sums.drawn[rows] = _drawn_from_all(e, where[rows], space)
        elif where is not None:
            torch.sum(masses.view(len(masses), -1, _DRAW_BLOCK), dim=2, out=sums.blocks[rows])
    return sums


def _top(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """[R] the largest entries; fills [R, V // 32] `maxima`, each over 32 entries that are V // 32 apart."""
    width = maxima.shape[1]
    if not width:
        return logits.amax(dim=1)
    torch.amax(logits[:, : width * _PARTS].view(len(logits), _PARTS, width), dim=1, out=maxima)
    top = maxima.amax(dim=1)
    rest = logits[:, width * _PARTS :]
    return torch.maximum(top, rest.amax(dim=1)) if rest.shape[1] else top


def _powers(
    t: torch.Tensor, e: torch.Tensor, temperatures: tuple[float, ...], powers: torch.Tensor, space: Workspace
) -> None:
    """Fill [R, V] e and [R, temperatures] sum exp(t / T); the two usual temperatures take no exponential more."""
    root_sum = None
    if 2.0 in temperatures:
        root = _exp(torch.mul(t, 0.5, out=e), out=e)
        root_sum = root.sum(dim=1)
        torch.mul(root, root, out=e)
    else:
        _exp(t, out=e)
    for column, temperature in enumerate(temperatures):
        if root_sum is not None and temperature == 2.0:
            powers[:, column] = root_sum
        elif temperature == 0.5:
            powers[:, column] = _dot(e, e)
        else:
            scratch = space.take("scratch", (t.shape[0], t.shape[1]), t, torch.float32)
            powers[:, column] = _exp(torch.mul(t, 1.0 / temperature, out=scratch), out=scratch).sum(dim=1)


def _weighted(e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """[R] sum e t."""
    weighted = _dot(e, t)
    if not torch.isfinite(weighted).all():
        # 0 * -inf of a masked id; a row that is NaN itself stays NaN, as its e are.
        weighted = _dot(e, t.clamp(min=torch.finfo(torch.float32).min))
    return weighted


def _exp(values: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """On a CPU numpy's takes half the time of torch's."""
    if values.is_cpu:
        np.exp(values.numpy(), out=out.numpy())
        return out
    return torch.exp(values, out=out)


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[R] the product of each two rows; on a CPU numpy's takes half the time of torch's."""
    if left.is_cpu:
        with np.errstate(invalid="ignore"):  # 0 * -inf, which the caller looks for
            return torch.from_numpy(np.vecdot(left.numpy(), right.numpy()))
    product: torch.Tensor = torch.linalg.vecdot(left, right)
    return product


def _top_k(logits: torch.Tensor, maxima: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, K] entries and ids by falling entry."""
    width = maxima.shape[1]
    # torch's own is fast on a GPU, and where the bound would not leave out much.
    if logits.is_cuda or width < 4 * k:
        return _torch_top_k(logits, k)
    flat, stride = _flat(logits)
    bound = np.partition(maxima.numpy(), width - k, axis=1)[:, width - k]
    at = _at_least(logits.numpy(), flat, stride, maxima.numpy(), bound)
    rows = at // stride
    counts = np.bincount(rows, minlength=len(bound))
    if counts.min() < k or counts.max() > 8 * k:  # NaN, or as many equal entries as make the bound useless
        return _torch_top_k(logits, k)
    return _sorted(flat[at], at - rows * stride, rows, counts, k)


def _torch_top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.topk(logits, k, dim=-1)
    return found.values, found.indices


def _flat(logits: torch.Tensor) -> tuple[NDArray[np.float32], int]:
    """All entries as one array without a copy, and how far rows are apart in it: vLLM cuts a padded vocabulary off."""
    num_rows, vocab_size = logits.shape
    stride = logits.stride(0)
    return logits.as_strided(((num_rows - 1) * stride + vocab_size,), (1,)).numpy(), stride


def _at_least(
    values: NDArray[np.float32],
    flat: NDArray[np.float32],
    stride: int,
    maxima: NDArray[np.float32],
    bound: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Rising indices into `flat` of [S, V] values at or above their row's [S] bound, by [S, V // 32] maxima."""
    width = maxima.shape[1]
    hit = np.flatnonzero(maxima >= bound[:, None])
    row = hit // width
    columns = (hit + row * (stride - width))[:, None] + np.arange(_PARTS) * width
    at = columns[flat[columns] >= bound[row, None]]
    # What is left of the vocabulary behind 32 parts of equal width.
    rest_row, rest_column = np.nonzero(values[:, width * _PARTS :] >= bound[:, None])
    return np.sort(np.concatenate([at, rest_row * stride + rest_column + width * _PARTS]))


def _sorted(
    found: NDArray[np.float32], columns: NDArray[np.int64], rows: NDArray[np.int64], counts: NDArray[np.int64], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `k` of each row's `counts` candidates, which come by rising id; ties by rising id."""
    places = np.arange(len(found)) - (np.cumsum(counts) - counts)[rows]
    values = np.full((len(counts), counts.max()), np.inf, np.float32)
    ids = np.zeros(values.shape, np.int32)
    values[rows, places] = -found
    ids[rows, places] = columns
    order = np.argsort(values, axis=1, kind="stable")[:, :k]
    taken = np.take_along_axis(values, order, axis=1)
    return torch.from_numpy(np.negative(taken, out=taken)), torch.from_numpy(np.take_along_axis(ids, order, axis=1))


def _counted(drawn: torch.Tensor) -> Drawn:
    ordered = np.sort(drawn.to(torch.int32).cpu().numpy(), axis=1)
    first = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    at = np.flatnonzero(first)
    # A position's N draws are N neighbours, so a run ends where the next begins, be it of the next position.
    counts = np.diff(at, append=ordered.size).astype(np.int32)
    return first.sum(axis=1, dtype=np.int64), ordered.reshape(-1)[at], counts


def _look_up(logits: torch.Tensor, sums: _Sums, where: torch.Tensor, space: Workspace) -> torch.Tensor:
    """[S, N] ids, for few draws: only blocks that are hit are summed up id by id."""
    vocab_size = logits.shape[1]
    ends = sums.blocks.double().cumsum(dim=-1)
    num_blocks = ends.shape[1]
    target = _within(where * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True).clamp_(max=num_blocks - 1)
    starts = torch.nn.functional.pad(ends, (1, 0))
    begin, end = starts.gather(1, block), starts.gather(1, block + 1)
    found = _blocks_of(logits, block, space).sub_(sums.top[:, None, None])
    inside = space.take("sums", tuple(found.shape), logits, torch.float64)
    inside.copy_(_exp(found, out=found)).cumsum_(dim=-1)
    # The float32 sum of a block and the float64 one of its ids differ by rounding: the same share of both is meant.
    share = ((target - begin) / (end - begin))[:, :, None]
    offset = torch.searchsorted(inside, _within(share * inside[:, :, -1:], inside[:, :, -1:]), right=True)
    return (block * _DRAW_BLOCK + offset[:, :, 0]).clamp_(max=vocab_size - 1)


def _blocks_of(logits: torch.Tensor, block: torch.Tensor, space: Workspace) -> torch.Tensor:
    """[S, N, 64] logits of the [S, N] blocks; -inf behind the vocabulary."""
    num_rows, vocab_size = logits.shape
    stride, num_blocks = logits.stride(0), _num_blocks(vocab_size)
    size = num_rows * stride
    if stride % _DRAW_BLOCK or 4 * (logits.storage_offset() + size) > logits.untyped_storage().nbytes():
        stride = num_blocks * _DRAW_BLOCK
        size = num_rows * stride
        padded = space.take("padded", (num_rows, stride), logits, torch.float32)
        padded[:, :vocab_size] = logits
        logits = padded
    blocks = logits.as_strided((size // _DRAW_BLOCK, _DRAW_BLOCK), (_DRAW_BLOCK, 1))
    first = torch.arange(num_rows, device=logits.device)[:, None] * (stride // _DRAW_BLOCK)
    found = space.take("found", (block.numel(), _DRAW_BLOCK), logits, torch.float32)
    found = torch.index_select(blocks, 0, (first + block).view(-1), out=found).view(*block.shape, _DRAW_BLOCK)
    if vocab_size % _DRAW_BLOCK:
        found[:, :, vocab_size % _DRAW_BLOCK :].masked_fill_((block == num_blocks - 1)[:, :, None], -torch.inf)
    return found


def _drawn_from_all(e: torch.Tensor, where: torch.Tensor, space: Workspace) -> torch.Tensor:
    """[R, N] ids, for many draws."""
    num_rows, vocab_size = e.shape
    ends = space.take("sums", (num_rows, vocab_size), e, torch.float64)
    ends.copy_(e).cumsum_(dim=-1)
    drawn: torch.Tensor = torch.searchsorted(ends, _within(where * ends[:, -1:], ends[:, -1:]), right=True)
    return drawn.clamp_(max=vocab_size - 1)


def _within(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A product that rounds up to all of the mass would fall behind the last id that has any."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
