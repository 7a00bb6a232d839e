"""Memory of batches, whose arrays are made and freed all the time."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's parameters, from its malloc.h."""
_KEPT_BYTES = 512 << 20
_OF_THE_SYSTEM_BYTES = 32 << 20
"""The most that glibc takes: larger arrays come from the system, and go back to it."""


def keep_freed_memory() -> None:
    """Make this process keep up to 512 MiB that it frees for what it allocates next; without glibc, do nothing.

    By default each array of a batch takes fresh pages from the system and gives them back, which costs a reader more
    time than all of its decoding.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _OF_THE_SYSTEM_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
