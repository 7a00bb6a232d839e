"""A conversation whose questions are not to be learnt: targets that count in a step, and the error of its gradient.

The reference is a dense float64 loss over the taught positions alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from potstill.cache.corpus import IngestPlan
from potstill.cache.corpus.ingest import ingest_rows
from potstill.cache.store.root import Root
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.losses import distillation_loss
from tests.support.tiny_runs import VOCAB, word_tokenizer

ROWS, TAUGHT_FROM = 6, 3


def masked_corpus(folder: Path) -> Path:
    """Make a corpus of rows of ten tokens of which the first are questions; of one row nothing is taught."""
    from potstill.cache.corpus.spool import SourceRow

    random = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        taught = np.arange(10) >= (TAUGHT_FROM + number % 3 if number != 2 else 10)
        tokens = random.integers(1, VOCAB, 10).astype(np.uint32)
        rows.append(SourceRow(tokens, taught=taught, ends_document=True))
    root = Root.open(folder / "cache", create=True)
    ingest_rows(root, "docs", rows, word_tokenizer(), IngestPlan(row_tokens=10, shard_positions=30))
    return folder / "cache"


def reader_of(folder: Path) -> BatchReader:
    """Open the corpus for reading, without teachers."""
    from potstill.cache.cache import Cache

    return BatchReader(Cache.open(folder).corpus("docs"))


def cross_entropy_error(reader: BatchReader) -> tuple[int, float]:
    """Count the targets that a batch of all rows counts, and the largest error of its gradient in float64."""
    counted, logits = 0, torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, 10, VOCAB)))
    reference = logits.clone().requires_grad_()
    total, taught_labels = reference.new_zeros(()), 0
    corpus, grad = reader.corpus, torch.zeros_like(logits)
    (masks, rows) = (corpus.take_loss_mask(range(ROWS)), corpus.take(range(ROWS)))
    for i, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        for t in np.flatnonzero(mask[:-1]):
            total = total - reference[i, t].log_softmax(-1)[int(row[t + 1])]
            taught_labels += 1
    (total / taught_labels).backward()  # type: ignore[no-untyped-call]
    for start in (0, 2, 3):  # the row without a taught target is a micro-batch of its own
        rows_here = range(start, {0: 2, 2: 3, 3: ROWS}[start])
        batch = reader.read(list(rows_here))
        z: Tensor = logits[rows_here.start : rows_here.stop].clone().requires_grad_()
        labels = int(sum(mask[:-1].sum() for mask in masks))
        loss = distillation_loss(
            z, batch.labels, (), alpha=0.0, mask=batch.mask, num_labels=labels, num_positions=labels
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        grad[rows_here.start : rows_here.stop] = z.grad
        counted += batch.num_positions
    assert reference.grad is not None
    return counted, float((grad - reference.grad).abs().max())


if __name__ == "__main__":
    try:
        COUNTED, ERROR = cross_entropy_error(reader_of(masked_corpus(Path.cwd())))
        print(f"{COUNTED} of {ROWS * 10} targets count, gradient off by {ERROR:.0e}")
    except ImportError:
        print("a corpus has no loss mask: all targets count")
