"""Rows with their targets: `order` says which come, `held_out` which never do; `sources` have targets, `batch` pads."""

from __future__ import annotations

from potstill.student_trainer.data.batch import Batch, BatchReader

__all__ = ["Batch", "BatchReader"]
