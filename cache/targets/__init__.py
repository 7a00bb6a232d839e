"""Teachers' targets for a corpus: segments, the commits that publish them, rank tables, reads by position or row.

Built on `corpus`, `encoding` and `store`.
"""

from __future__ import annotations

from potstill.cache.targets.commit import Commit
from potstill.cache.targets.segment_set import SegmentSet
from potstill.cache.targets.set_spec import SetSpec
from potstill.cache.targets.target_set import TargetSet

__all__ = ["Commit", "SegmentSet", "SetSpec", "TargetSet"]
