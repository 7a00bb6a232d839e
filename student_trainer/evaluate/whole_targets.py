"""Whole distributions of teachers, where a cache has them for a corpus: the `dense` field of a small split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.errors import NotCommitted, UnknownTeacher
from potstill.cache.targets import TargetSet
from potstill.cache.types import Fields
from potstill.clients.http_targets import HttpCache, HttpTargets
from potstill.student_trainer.data.joined import JoinedCorpora

_DENSE = Fields(k=0, dense=True)


@dataclass(frozen=True, slots=True)
class WholeTargets:
    """One teacher's whole distributions of rows of one or more corpora."""

    corpora: JoinedCorpora
    parts: Mapping[str, TargetSet | HttpTargets]
    """Targets that have them, by corpus; at least one."""

    def read(self, row: int) -> NDArray[np.float32] | None:
        """Read the logprobs [T, U] of a row; None where its shard has none (yet).

        Raises:
            PotstillError: whatever reading raises else.
        """
        corpus, own = self.corpora.place(row)
        if corpus not in self.parts:
            return None
        try:
            (found,) = self.parts[corpus].read_rows([own], fields=_DENSE)
        except NotCommitted:
            return None
        return found.dense


def whole_targets(cache: Cache | HttpCache, teacher: str, corpora: JoinedCorpora) -> tuple[WholeTargets | None, str]:
    """Find a teacher's whole distributions; without any, None and one line that says how to make them."""
    there = {corpus.name: targets for corpus in corpora.corpora if (targets := _targets(cache, teacher, corpus))}
    parts = {name: targets for name, targets in there.items() if targets.fields.dense}
    if any(targets.unshared for targets in parts.values()):
        return None, (
            f"some ids are other tokens to teacher {teacher!r} than to the student, so its whole distributions were "
            "not compared with"
        )
    if parts:
        return WholeTargets(corpora, parts), ""
    if any(targets.fields.alignment for targets in there.values()):
        return None, (
            f"targets of teacher {teacher!r} are projected from another tokenizer's, which gives no whole "
            "distributions, so the exact KLs, total variation and acceptance were not measured"
        )
    name = corpora.corpora[0].name
    return None, (
        f"teacher {teacher!r} has no whole distributions of corpus {name!r}, which the exact KLs, total variation and "
        f"acceptance need; for a small corpus run `potstill prefill --cache ROOT --corpus {name} --teacher "
        f"{teacher}=MODEL --top-k 0 --dense`"
    )


def _targets(cache: Cache | HttpCache, teacher: str, corpus: Corpus) -> TargetSet | HttpTargets | None:
    try:
        return cache.targets(teacher, corpus.name)
    except UnknownTeacher:
        return None
