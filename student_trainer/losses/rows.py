"""The two passes over rows of logits that every loss makes: in plain torch, or by Triton's kernels on a GPU."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """The first pass and the second, over one z [n, V + 1]; in between only they know what z holds."""

    sums: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Find the largest entry [n] of each row, 0 for one of nothing but -inf, and the sum [n] of exp(z - largest)."""
    write: Callable[[Tensor, Tensor, Tensor], None]
    """Write exp(z - largest) * factor over z, given z, largest [n] and factor [n]."""


def _sums(z: Tensor) -> tuple[Tensor, Tensor]:
    top = z.amax(dim=-1)
    top = top.masked_fill(top == -math.inf, 0.0)  # nothing is left where K is all of the vocabulary
    return top, z.sub_(top[:, None]).exp_().sum(dim=-1)


def _write(z: Tensor, _top: Tensor, factor: Tensor) -> None:
    z.mul_(factor[:, None])  # the exponentials stand there since the sums were made


PLAIN = Rows(_sums, _write)
"""Plain torch, on any device; one exponential for each logit, in about three times the memory accesses."""


@functools.cache
def rows_for(device: torch.device) -> Rows:
    """Choose the passes for a device: Triton's kernels on a GPU where they give what plain torch does, else that.

    With TRITON_INTERPRET=1 in the environment Triton interprets its kernels, on a CPU too: that is for tests.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return PLAIN
    try:
        kernels = importlib.import_module("potstill.student_trainer.losses.triton_rows")
    except ImportError:
        return PLAIN
    rows = Rows(kernels.sums, kernels.write)
    try:
        _try_out(rows, device)
    # Triton compiles at the first call, and for that needs a C compiler and Python's headers on the machine.
    except (kernels.TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        _log.warning("the loss runs without Triton's kernels, which fail on %s: %.300s", device, error)
        return PLAIN
    return rows


def _try_out(rows: Rows, device: torch.device) -> None:
    """Compare with plain torch on two small rows.

    Raises:
        RuntimeError: they differ.
    """
    z = torch.linspace(-9.0, 3.0, 2 * 333, device=device).reshape(2, 333)
    factor = torch.tensor([0.5, -2.0], device=device)
    found = []
    for each in (rows, PLAIN):
        gradient = z.clone()
        top, e_sum = each.sums(gradient)
        each.write(gradient, top, factor)
        found.append(torch.cat([top + e_sum.log(), gradient.flatten()]))
    ours, plain = found
    if not torch.allclose(ours, plain, rtol=1e-4, atol=1e-6):
        raise RuntimeError("their results are not those of plain torch")
