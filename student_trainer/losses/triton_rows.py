"""Triton's kernels for the two passes over rows of logits; see `rows`.

They read the logits twice and write them once, where plain torch goes over them eight times. Each exponential is made
twice instead, which costs a GPU nothing beside its memory.

Not run on a GPU yet, only by Triton's interpreter and its compiler for one.

Shape legend:  n rows, V + 1 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

__all__ = ["TritonError", "sums", "write"]

BLOCK = 4096
"""Columns at a time."""
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def sums_kernel(
    z: tl.tensor, top: tl.tensor, e_sum: tl.tensor, stride: tl.tensor, columns: tl.tensor, block: tl.constexpr
) -> None:
    """Go over one row a program: the sums so far are made smaller when a larger entry comes."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full([], -float("inf"), z.dtype.element_ty)
    shares = tl.zeros([block], z.dtype.element_ty)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        x = tl.load(z + row * stride + at, mask=at < columns, other=-float("inf"))
        higher = tl.maximum(highest, tl.max(x, axis=0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is no number
        shares = shares * tl.exp(highest - finite) + tl.exp(x - finite)
        highest = higher
    tl.store(top + row, tl.where(highest == -float("inf"), 0.0, highest))
    tl.store(e_sum + row, tl.sum(shares, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def write_kernel(
    z: tl.tensor, top: tl.tensor, factor: tl.tensor, stride: tl.tensor, columns: tl.tensor, block: tl.constexpr
) -> None:
    """Go over one block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    there = z + row * stride + at
    x = tl.load(there, mask=at < columns, other=0.0)
    tl.store(there, tl.exp(x - tl.load(top + row)) * tl.load(factor + row), mask=at < columns)


def sums(z: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `Rows.sums`; z [n, V + 1] float32 or float64 with columns side by side stays as it is."""
    top, e_sum = z.new_empty(len(z)), z.new_empty(len(z))
    # Triton launches on the current device, which may be another.
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        sums_kernel[(len(z),)](z, top, e_sum, z.stride(0), z.shape[1], block=BLOCK, num_warps=_WARPS)
    return top, e_sum


def write(z: Tensor, top: Tensor, factor: Tensor) -> None:
    """Do as `Rows.write`."""
    grid = (len(z), triton.cdiv(z.shape[1], BLOCK))
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        write_kernel[grid](z, top, factor, z.stride(0), z.shape[1], block=BLOCK, num_warps=_WARPS)
