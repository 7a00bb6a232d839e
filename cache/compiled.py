"""Machine code by numba, kept on disk between processes where there is a place for it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

Function = TypeVar("Function", bound=Callable[..., object])

_LOG = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size


class _Damaged(Exception):
    """A kept file is not what was written."""


class _KeptFile:
    """Of one function: a file for each signature and processor, which is read only where it is what was written.

    numba's own files have no checksum, so that a flipped bit runs as code, and their numbers can be given twice when
    two processes compile at a time.
    """

    def __init__(self, folder: str, name: str, stamp: object) -> None:
        self._folder = Path(folder)
        self._name = name
        self._stamp = f"{numba.__version__} {stamp}"
        """What else must be the same: numba, and the source file's time and size."""

    def load(self, key: object) -> Any:
        """What was saved under the key, or None.

        Raises:
            _Damaged: the file is not what was written. OSError: it cannot be read.
        """
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, kept = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(kept).digest() != digest:
            raise _Damaged(f"{path.name} is damaged")
        stamp, data = pickle.loads(kept)  # noqa: S301 -- as numba does; who can write here can run code
        return data if stamp == self._stamp else None

    def save(self, key: object, data: object) -> None:
        """Keep it in place of what was there; raises OSError, and leaves nothing half written."""
        path = self._path(key)
        kept = dumps((self._stamp, data))
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(kept).digest() + kept)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def flush(self) -> None:
        """Forget all signatures."""
        for path in self._folder.glob(f"{self._name}.*.code"):
            path.unlink(missing_ok=True)

    def _path(self, key: object) -> Path:
        # Types are told by their names, which numba also tells machine code apart by.
        return self._folder / f"{self._name}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.code"


class _Kept(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Where a file is damaged or cannot be read or written, the code is compiled in each process instead of raising."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        self._cache_file = _KeptFile(self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (_Damaged, OSError) as error:
            self._tell("read", error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
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
