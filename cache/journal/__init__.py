"""The journal: rows that were scored over HTTP and belong to no corpus; stored, found again, joined, evicted.

`compact` makes a corpus of them.
"""

from __future__ import annotations

from potstill.cache.journal.journal import Journal, JournalPolicy
from potstill.cache.journal.segment import SegmentRecord

__all__ = ["Journal", "JournalPolicy", "SegmentRecord"]
