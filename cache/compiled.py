"""Machine code by numba, kept on disk between processes where there is a place for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function, *, reordered: bool = False, **options: Any) -> Function:
    """The function compiled at its first call; it lets other threads run, and divides by zero as numpy does.

    Args:
        function: its arguments are arrays and numbers.
        reordered: its sums may be taken in any order and its products fused; NaN and inf stay what they are.
        options: further ones of `numba.njit`.
    """
    fastmath: Any = {"contract", "nsz", "reassoc"} if reordered else False
    options |= {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # neither the package's folder nor the user's can be written: compiled in each process
        return cast(Function, numba.njit(**options)(function))
