"""Fill of a target set from a teacher: which shards are left, which job scores which, writing beside scoring.

A fill that is stopped at any moment goes on from the shards that are committed.
"""

from __future__ import annotations

from potstill.cache.fill.loop import FillPlan, FillProgress, FillReport, fill

__all__ = ["FillPlan", "FillProgress", "FillReport", "fill"]
