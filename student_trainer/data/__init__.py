"""Rows with their targets: `mixture` and `order` say which come, `held_out` which never do; `batch` makes tensors.

`sources` have one corpus's targets, which `checks` looks at; `joined` makes one of several corpora. `steps` plans a
run's micro-batches by `packing` and reads them ahead by `prefetch`, into the `memory` of earlier ones; `repeated` has
those of evaluations. `dataset` is for other people's loops. Importing this is fast: what needs torch is imported when
it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.student_trainer.data.batch import Batch, BatchReader
    from potstill.student_trainer.data.dataset import TargetDataset

__all__ = ["Batch", "BatchReader", "TargetDataset"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from potstill.student_trainer.data import batch, dataset  # noqa: PLC0415 -- torch takes seconds to import

        return getattr(dataset if name == "TargetDataset" else batch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
