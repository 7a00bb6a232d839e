"""Machine code by numba, kept on disk between processes where there is a folder for it.

What numba keeps has no checksum, and its files are not safe from two processes that first compile a function for
different types at the same time: damaged or mixed-up code runs, or ends the process. Deleting the kept files (`*.nbi`
and `*.nbc` in `__pycache__`, or the folder `NUMBA_CACHE_DIR`) has all of it compiled anew.
"""

from __future__ import annotations

import contextlib
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
    dispatcher = numba.njit(**options)(function)
    # RuntimeError: neither the package's folder nor the user's can be written; it is compiled in each process.
    with contextlib.suppress(RuntimeError):
        dispatcher.enable_caching()
    return cast(Function, dispatcher)
