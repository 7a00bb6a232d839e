"""A teacher with the cache in front of it: known rows are answered from the cache, others scored once and kept."""

from __future__ import annotations

from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy

__all__ = ["CachedTeacher", "KeepPolicy"]
