"""Rows with their targets: `mixture` and `order` say which come, `held_out` which never do; `batch` pads them.

`sources` have one corpus's targets; `joined` makes one of several corpora. Importing this is fast: what needs torch is
imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.student_trainer.data.batch import Batch, BatchReader

__all__ = ["Batch", "BatchReader"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from potstill.student_trainer.data import batch  # noqa: PLC0415 -- torch takes seconds to import

        return getattr(batch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
