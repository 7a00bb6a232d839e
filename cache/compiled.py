"""Machine code by numba, kept on disk between processes where there is a place for it."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., object])

_LOG = logging.getLogger(__name__)
# What reading a kept file raises that is not whole: pickle names the first five, and llvmlite refuses what is no code.
_DAMAGED = (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, ValueError, RuntimeError)


class _Kept(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Of files that are damaged or cannot be written, the code is compiled in each process instead of raising."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (OSError, *_DAMAGED) as error:
            self._tell("read", error)
        try:
            self.flush()
        except OSError as error:
            self._tell("emptied", error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except (OSError, *_DAMAGED) as error:
            self._tell("written", error)

    def _tell(self, done: str, error: Exception) -> None:
        _LOG.warning("compiled code in %s could not be %s, which costs time: %s", self.cache_path, done, error)


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
        dispatcher._cache = _Kept(function)  # noqa: SLF001 -- what `enable_caching` does with a class of its own
    return cast(Function, dispatcher)
