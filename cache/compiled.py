"""Compilation by numba, whose machine code is kept on disk between processes where there is a folder for it.

numba's files have no checksum, and are not safe from two processes that compile a function for different types for the
first time at once: damaged or mixed-up code runs, or ends the process. Delete the files (`*.nbi` and `*.nbc` in
`__pycache__`, or the folder `NUMBA_CACHE_DIR`) to have everything compiled anew.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])

_LOG = logging.getLogger(__name__)


def compiled(function: Function, *, reordered: bool = False, **options: Any) -> Function:
    """Make a function be compiled at its first call. It releases the GIL, and divides by zero as numpy does.

    Args:
        function: takes arrays and numbers.
        reordered: allow sums in any order and fused products, which is faster; NaN and inf stay what they are.
        options: further options of `numba.njit`.
    """
    fastmath: Any = {"contract", "nsz", "reassoc"} if reordered else False
    options |= {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    dispatcher = numba.njit(**options)(function)
    # RuntimeError: neither the package's folder nor the user's can be written; it is compiled in each process.
    with contextlib.suppress(RuntimeError):
        dispatcher.enable_caching()
    compile_and_keep = dispatcher.compile

    def compile_anyway(signature: Any) -> Any:
        try:
            return compile_and_keep(signature)
        except OSError as error:
            _LOG.warning("the compiled code of %s is not kept for other processes: %s", function.__qualname__, error)
            return compile_and_keep(signature)  # it is compiled: only keeping it, which comes last, had failed

    dispatcher.compile = compile_anyway
    return cast(Function, dispatcher)
