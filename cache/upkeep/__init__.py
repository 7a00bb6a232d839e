"""Upkeep of a cache: inspection, integrity, drift from a live teacher, garbage, deletion, estimates."""

from __future__ import annotations

from potstill.cache.upkeep.drift import measure_drift
from potstill.cache.upkeep.garbage import find_garbage
from potstill.cache.upkeep.inspection import inspect_cache
from potstill.cache.upkeep.integrity import check_cache

__all__ = ["check_cache", "find_garbage", "inspect_cache", "measure_drift"]
