"""Rows with their targets: `mixture` and `order` say which come, `held_out` which never do; `batch` pads them.

`sources` have one corpus's targets; `joined` makes one of several corpora.
"""

from __future__ import annotations

from potstill.student_trainer.data.batch import Batch, BatchReader

__all__ = ["Batch", "BatchReader"]
