"""Rows with their targets for other people's training loops: a map-style dataset, and batches as dictionaries.

It travels to the workers of a `DataLoader`, forked or spawned, and Accelerate and `transformers.Trainer` move its
batches to a device.

Shape legend:  B rows of the tensors, T tokens of the fullest of them, K kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from potstill.student_trainer.data.batch import BatchReader, Example
from potstill.student_trainer.data.packing import plan_micro_batches
from potstill.student_trainer.losses import TeacherTargets


class TargetDataset(Dataset[Example]):
    """Every row of a reader's corpus with every source's targets; `collate` makes batches of them."""

    def __init__(self, reader: BatchReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.corpus)

    def __getitem__(self, row: int) -> Example:
        """Read one row; raises as `BatchReader.read_packed`."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Example]:
        """Read the rows of a batch together, as a `DataLoader` asks for them."""
        return self.reader.examples(rows)

    def collate(self, examples: Sequence[Example], *, pack: bool = False) -> dict[str, Any]:
        """Make a batch of rows.

        Args:
            examples: the rows.
            pack: whether rows may share one, which the student must keep apart by `position_ids`
                (`potstill.student_trainer.data.packing.keeps_rows_apart`).

        Returns:
            `input_ids` [B, T] int64; `labels` [B, T] int64, the **next** token at each position, or -100 (so that
            models must not be given them, which would shift them again); `mask` [B, T] bool, true where a target is
            learnt; `teachers`, for each the arguments of a `TeacherTargets`; and with rows that share one
            `position_ids` [B, T] int64.
        """
        bins: Sequence[Sequence[int]] = [[i] for i in range(len(examples))]
        if pack:
            lengths = np.array([len(example.tokens) + len(self.reader.prefix) for example in examples], dtype=np.int64)
            [[bins]] = plan_micro_batches([lengths], len(examples), self.reader.longest_row, pack=True)
        batch = self.reader.laid([[examples[i] for i in each] for each in bins])
        found: dict[str, Any] = {"input_ids": batch.tokens, "labels": batch.labels, "mask": batch.mask}
        found["teachers"] = [_arguments(teacher) for teacher in batch.teachers]
        return found if batch.position_ids is None else {**found, "position_ids": batch.position_ids}


def _arguments(teacher: TeacherTargets) -> dict[str, Any]:
    values = {field.name: getattr(teacher, field.name) for field in fields(teacher)}
    return {name: value for name, value in values.items() if value is not None}
