"""Evidence about a student on some rows: every measure with its standard error over documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.projection.categories import CATEGORIES
from potstill.cache.types import JSON
from potstill.student_trainer.evaluate.calibration import Bin, calibration_error, reliability
from potstill.student_trainer.evaluate.labels import LabelTable
from potstill.student_trainer.evaluate.means import Measure, perplexity, ratio
from potstill.student_trainer.evaluate.measuring import Sums
from potstill.student_trainer.evaluate.positions import KEPT, TEXT, WHOLE

_BYTES = len(TEXT)
_LN_2 = math.log(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Measures of some positions; None where there are none to measure."""

    tokens: int
    """Labels."""
    loss: Measure | None
    """Cross-entropy, nats a label."""
    bits_per_byte: Measure | None
    top1: Measure | None
    """Share of labels that the student finds most likely."""
    kl: dict[str, Measure | None]
    """Forward KL of top-k + tail to each teacher, nats a position."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        told: dict[str, JSON] = {"tokens": self.tokens}
        told |= {name: _json(getattr(self, name)) for name in ("loss", "bits_per_byte", "top1")}
        return told | {"kl": {name: _json(each) for name, each in self.kl.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was measured on some rows."""

    rows: int
    documents: int
    all: Part
    ece: Measure | None
    """Expected calibration error."""
    bins: list[Bin]
    """The reliability diagram."""
    teachers: dict[str, dict[str, Measure | None]]
    """Measures of `KEPT` and `WHOLE` by name, for each teacher."""
    by_category: dict[str, Part]
    """By the kind of the next token; kinds that occur."""
    by_source: dict[str, Part]
    """By the file or corpus that a document is from; none where there is one only, or nobody said."""
    notes: list[str]
    """Why something was not measured, and how it can be."""

    @property
    def measured(self) -> dict[str, Measure | None]:
        """Measures over all labels, by name."""
        one = self.all
        loss = None if one.loss is None else perplexity(one.loss)
        return {"loss": one.loss, "perplexity": loss, "bits_per_byte": one.bits_per_byte, "top1": one.top1}

    def text_json(self) -> dict[str, JSON]:
        """A JSON object of what was measured of the text itself."""
        told: dict[str, JSON] = {name: _json(each) for name, each in self.measured.items()}
        return told | {"rows": self.rows, "documents": self.documents, "tokens": self.all.tokens}

    def more_json(self) -> dict[str, JSON]:
        """A JSON object of all else."""
        return {
            "teachers": {
                name: {measure: _json(each) for measure, each in found.items()} for name, found in self.teachers.items()
            },
            "ece": _json(self.ece),
            "reliability": [each.to_json() for each in self.bins],
            "by_category": {name: each.to_json() for name, each in self.by_category.items()},
            "by_source": {name: each.to_json() for name, each in self.by_source.items()},
            "notes": list(self.notes),
        }


def evidence_of(
    sums: Sums, *, rows: int, labels: LabelTable, sources: Mapping[str, NDArray[np.bool_]], notes: Sequence[str] = ()
) -> Evidence:
    """Make means of the sums of documents.

    Args:
        sums: of all rows.
        rows: how many there were.
        labels: with which the sums were made.
        sources: [D] for each source, which of the documents are from it.
        notes: of what was not measured.
    """
    everything = np.ones(len(sums.documents), np.bool_)
    whole = _part(sums, everything, slice(None), labels)
    told = [f"bits per byte are not known: {labels.problem}"] if labels.problem else []
    if not whole.tokens:
        told.append("no position has a label, so there is no loss; ingest rows of at least two tokens")
    if len(everything) == 1:
        told.append("all rows are of one document, so there are no standard errors; hold out more documents")
    return Evidence(
        rows=rows,
        documents=len(sums.documents),
        all=whole,
        ece=calibration_error(sums.bins),
        bins=reliability(sums.bins),
        teachers={name: _teacher(sums, name) for name in dict.fromkeys([*sums.kept, *sums.whole])},
        by_category=_there(
            (name, _part(sums, everything, slice(group, group + 1), labels)) for group, name in enumerate(CATEGORIES)
        ),
        by_source=_there((name, _part(sums, mask, slice(None), labels)) for name, mask in sources.items()),
        notes=[*told, *notes],
    )


def evidence_json(
    held_out: Evidence | None, corpora: Mapping[str, Evidence], about: Mapping[str, JSON]
) -> dict[str, JSON]:
    """Write all that was found: of the held-out rows as such, of each corpus under its name in `corpora`."""
    told: dict[str, JSON] = dict(about)
    if held_out is not None:
        told |= {"held_out": held_out.text_json(), **held_out.more_json()}
    if corpora:
        told["corpora"] = {name: {**each.text_json(), **each.more_json()} for name, each in corpora.items()}
    return told


def _part(sums: Sums, documents: NDArray[np.bool_], groups: slice, labels: LabelTable) -> Part:
    text = sums.text[documents][:, groups].sum(axis=1)
    count, loss, right = (text[:, TEXT.index(name)] for name in ("labels", "loss", "right"))
    kl = {}
    for name, each in sums.kept.items():
        found = each[documents][:, groups].sum(axis=1)
        kl[name] = ratio(found[:, KEPT.index("kl")], found[:, 0])
    return Part(
        tokens=int(count.sum()),
        loss=ratio(loss, count),
        bits_per_byte=None if labels.num_bytes is None else ratio(loss / _LN_2, text[:, _BYTES]),
        top1=ratio(right, count),
        kl=kl,
    )


def _teacher(sums: Sums, name: str) -> dict[str, Measure | None]:
    found: dict[str, Measure | None] = {}
    for columns, sums_of in ((KEPT, sums.kept), (WHOLE, sums.whole)):
        values = sums_of[name].sum(axis=1) if name in sums_of else np.zeros((len(sums.documents), len(columns)))
        found |= {measure: ratio(values[:, i], values[:, 0]) for i, measure in enumerate(columns) if i}
    return found


def _there(parts: Iterable[tuple[str, Part]]) -> dict[str, Part]:
    return {name: part for name, part in parts if part.tokens}


def _json(measure: Measure | None) -> JSON:
    return None if measure is None else measure.to_json()
