"""The vocabulary and the cache of Potstill: teacher targets on disk, by corpus, shard and segment.

`import potstill.cache` is fast: `Cache`, which needs zarr, is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potstill.cache.types import Draws, Fields, Provenance, Targets, TeacherIdentity, TeacherLimits

if TYPE_CHECKING:
    from potstill.cache.cache import Cache

__all__ = ["Cache", "Draws", "Fields", "Provenance", "Targets", "TeacherIdentity", "TeacherLimits"]


def __getattr__(name: str) -> Any:
    if name == "Cache":
        from potstill.cache.cache import Cache  # noqa: PLC0415 -- zarr takes a second to import

        return Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
