"""Projection of targets: those of a teacher with another tokenizer become ordinary targets of a student's corpus.

`spelling` has what the ids of a tokenizer spell, `first_tokens` the map between two of them, `axis` where tokens lie in
the text, `aligned` what is at the same place, `kernels` the sums, `job` the work shard by shard, `tally` what aligned.
"""

from __future__ import annotations

from potstill.cache.projection.job import ProjectionPlan, ProjectionReport, project
from potstill.cache.projection.tally import Tally

__all__ = ["ProjectionPlan", "ProjectionReport", "Tally", "project"]
