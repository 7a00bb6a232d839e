"""Sums of all measures over the positions of each document, in one pass of a student over rows.

Shape legend:  D documents, G groups of labels (`CATEGORIES` and one without a label), T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.data import Batch, BatchReader
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.evaluate.calibration import BINS, bin_of
from potstill.student_trainer.evaluate.labels import NO_CATEGORY, LabelTable
from potstill.student_trainer.evaluate.positions import KEPT, TEXT, WHOLE, of_labels, of_top_k, of_whole
from potstill.student_trainer.evaluate.student import evaluating
from potstill.student_trainer.evaluate.whole_targets import WholeTargets
from potstill.student_trainer.losses import NO_LABEL, TeacherTargets
from potstill.student_trainer.models.precision import autocast

_LOGITS = 1 << 26
"""Entries of a batch's logits: 256 MiB in float32; one row may have more."""
_CHUNK = 1 << 22
"""Entries of [positions, V] of which measures are made at a time: 32 MiB in float64, and some of such arrays."""
_GROUPS = NO_CATEGORY + 1


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over the positions of each document, float64."""

    documents: NDArray[np.int64]
    """[D] number of each document among those of the reader's corpus."""
    text: NDArray[np.float64]
    """[D, G, 5] columns `TEXT`, and the bytes of the labels."""
    bins: NDArray[np.float64]
    """[D, B, 3] of `calibration`."""
    kept: dict[str, NDArray[np.float64]]
    """[D, G, 5] columns `KEPT`, by teacher that has a top-k."""
    whole: dict[str, NDArray[np.float64]]
    """[D, G, 5] columns `WHOLE`, by teacher that has whole distributions."""

    @classmethod
    def of(cls, documents: NDArray[np.int64], kept: Sequence[str], whole: Sequence[str]) -> Sums:
        """Begin at zero."""

        def zeros(*shape: int) -> NDArray[np.float64]:
            return np.zeros((len(documents), *shape))

        return cls(
            documents,
            zeros(_GROUPS, len(TEXT) + 1),
            zeros(BINS, 3),
            {name: zeros(_GROUPS, len(KEPT)) for name in kept},
            {name: zeros(_GROUPS, len(WHOLE)) for name in whole},
        )


def measure(
    model: PreTrainedModel,
    reader: BatchReader,
    rows: NDArray[np.int64],
    labels: LabelTable,
    whole: Mapping[str, WholeTargets],
    *,
    dtype: str = "float32",
    on_progress: Callable[[int], None] = lambda _: None,
) -> Sums:
    """Measure a student on rows of the reader's corpus, against the reader's sources.

    Args:
        model: on its device; left in the mode it was in.
        reader: rows and targets.
        rows: [N] row indexes, at least one.
        labels: of the corpus's tokenizer.
        whole: whole distributions, by the name of a source.
        dtype: of the forward pass, `float32` or `bfloat16`.
        on_progress: called with the number of rows that are done.

    Raises:
        InvalidInput: the model gives NaN. PotstillError: whatever reading raises.
    """
    of_row = np.searchsorted(reader.corpus.document_rows, rows, side="right") - 1
    documents, at = np.unique(of_row, return_inverse=True)
    measured = [m for m, source in enumerate(reader.sources) if source.top_k]
    sums = Sums.of(documents, [reader.sources[m].name for m in measured], list(whole))
    size = max(1, _LOGITS // (reader.longest_row * model.config.get_text_config().vocab_size))
    with evaluating(model):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = reader.read(part).to(model.device)
            with autocast(model.device, dtype):
                logits = model(**batch.inputs).logits
            for i, row in enumerate(part.tolist()):
                if logits[i][batch.mask[i]].isnan().any():
                    raise InvalidInput(
                        f"the model gives NaN in {_place(reader, row)}; its weights are damaged, or diverged"
                    )
                dense = {name: each.read(row) for name, each in whole.items()}
                found = _Row.of(batch, i, logits[i], measured, len(reader.prefix), dense)
                _add(sums, int(at[start + i]), found, labels)
            on_progress(start + len(part))
    return sums


def _place(reader: BatchReader, row: int) -> str:
    corpus = reader.corpus
    name, own = corpus.place(row) if isinstance(corpus, JoinedCorpora) else (corpus.name, row)
    return f"row {own} of corpus {name!r}"


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """The positions of one row that count."""

    logits: Tensor
    labels: Tensor
    teachers: tuple[TeacherTargets, ...]
    whole: dict[str, NDArray[np.float32]]

    @classmethod
    def of(
        cls,
        batch: Batch,
        i: int,
        logits: Tensor,
        measured: Sequence[int],
        prefix: int,
        whole: Mapping[str, NDArray[np.float32] | None],
    ) -> _Row:
        mask = batch.mask[i]
        stop = int(batch.lengths[i])
        counts = mask[prefix:stop].cpu().numpy()
        return cls(
            logits[mask],
            batch.labels[i][mask],
            tuple(each.each(lambda tensor: tensor[i][mask]) for each in (batch.teachers[m] for m in measured)),
            {name: each[counts] for name, each in whole.items() if each is not None},
        )

    def chunks(self) -> Iterator[_Row]:
        size = max(1, _CHUNK // self.logits.shape[-1])
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            # In float32 a sum over a vocabulary of 49k is off by 1e-5, more than teachers of one kind may differ by.
            yield _Row(
                self.logits[part].double(),
                self.labels[part],
                tuple(each.each(lambda tensor: tensor[part]) for each in self.teachers),  # noqa: B023 -- called here
                {name: each[part] for name, each in self.whole.items()},
            )


def _add(sums: Sums, document: int, row: _Row, table: LabelTable) -> None:
    """Add one row's measures to those of its document."""
    for chunk in row.chunks():
        labels = chunk.labels.cpu().numpy()
        log_p = chunk.logits.log_softmax(dim=-1)
        text = of_labels(log_p, chunk.labels).cpu().numpy()
        groups = _groups(labels, table)
        _add_text(sums, document, text, groups, _bytes(labels, table))
        for name, teacher in zip(sums.kept, chunk.teachers, strict=True):
            np.add.at(sums.kept[name][document], groups, of_top_k(chunk.logits, teacher).cpu().numpy())
        for name, logprobs in chunk.whole.items():
            log_t = torch.from_numpy(logprobs).to(log_p.device)
            np.add.at(sums.whole[name][document], groups, of_whole(log_p, log_t).cpu().numpy())


def _add_text(
    sums: Sums, document: int, text: NDArray[np.float64], groups: NDArray[np.int64], num_bytes: NDArray[np.float64]
) -> None:
    np.add.at(sums.text[document], groups, np.column_stack([text, num_bytes]))
    there = text[:, TEXT.index("labels")] > 0
    confidence, right = (text[there, TEXT.index(name)] for name in ("confidence", "right"))
    counted: Any = np.column_stack([np.ones(len(right)), confidence, right])
    np.add.at(sums.bins[document], bin_of(confidence), counted)


def _groups(labels: NDArray[np.int64], table: LabelTable) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.where(labels == NO_LABEL, NO_CATEGORY, table.category[np.maximum(labels, 0)])
    return found


def _bytes(labels: NDArray[np.int64], table: LabelTable) -> NDArray[np.float64]:
    if table.num_bytes is None:
        return np.zeros(len(labels))
    return np.where(labels == NO_LABEL, 0.0, table.num_bytes[np.maximum(labels, 0)])
