"""Descriptions of corpora and target sets as JSON, small at any number of shards: commits are told as runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.errors import PotstillError
from potstill.cache.targets import SegmentSet, TargetSet
from potstill.cache.types import JSON
from potstill.cache.wire import scores as wire
from potstill.teacher_service.routes.corpora.opened_sets import OpenedSets
from potstill.teacher_service.settings import LimitSettings


def runs(committed: NDArray[np.bool_]) -> list[JSON]:
    """The committed shards as runs `[first, one past the last]`, in order."""
    edges = np.flatnonzero(np.diff(committed.astype(np.int8), prepend=0, append=0))
    return [[first, stop] for first, stop in edges.reshape(-1, 2).tolist()]


def describe_corpora(opened: OpenedSets) -> dict[str, Any]:
    """Describe all corpora in short; those that cannot be read are listed apart and do not hide the others."""
    seen = opened.look_at_corpora(lambda name: {**_counts(opened.corpus(name)), "teachers": opened.teachers(name)})
    unreadable = [{"name": name, "detail": error.detail} for name, error in seen.unreadable.items()]
    return {"format": wire.WIRE_VERSION, "corpora": list(seen.found.values()), "unreadable": unreadable}


def describe_corpus(opened: OpenedSets, name: str) -> dict[str, Any]:
    """Describe one corpus: its seal, its annotations, and each teacher's committed shards."""
    corpus = opened.corpus(name)
    spec = corpus.spec
    # `data` and `objects` name what only the store's readers use, and grow with the corpus.
    left_out = {"data", "sources", "objects", "num_documents"}
    if spec.num_taught is None:
        left_out.add("num_taught")
    # Clients of before refuse a seal with a key that they do not know: here that they would train on what is masked.
    sealed = {key: getattr(spec, key) for key in spec.__dataclass_fields__ if key not in left_out}
    return {
        "format": wire.WIRE_VERSION,
        **_counts(corpus),
        "documents": spec.num_documents,
        "tokenizer_files": bool(corpus.tokenizer_files_objects),
        "spec": {**sealed, "sources": [asdict(source) for source in spec.sources]},
        "annotations": corpus.annotations(),
        "teachers": {teacher: _coverage(opened, teacher, name) for teacher in opened.teachers(name)},
    }


def describe_targets(targets: TargetSet, limits: LimitSettings) -> dict[str, Any]:
    """Describe one target set: its teacher and corpus, its fields and encoding, and the committed shards."""
    return {
        "format": wire.WIRE_VERSION,
        "teacher": targets.teacher,
        "corpus": targets.corpus.name,
        "corpus_fingerprint": targets.corpus.fingerprint,
        "identity": targets.identity.to_json(),
        "unshared_ids": targets.unshared.to_json(),
        "fields": targets.fields.to_json(),
        "names": [each.name for each in targets.fields.asked],
        "encoding": targets.encoding.to_json(),
        **_committed(targets.committed),
        "sets": [_set(each) for each in targets.sets],
        "limits": {"max_rows": limits.max_rows, "max_stream_positions": limits.max_stream_positions},
    }


def _counts(corpus: Corpus) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "rows": len(corpus),
        "positions": corpus.num_positions,
        "shards": corpus.num_shards,
        "tokenizer_sha256": corpus.tokenizer_sha256,
    }


def _coverage(opened: OpenedSets, teacher: str, corpus: str) -> dict[str, Any]:
    # One damaged target set must not hide the others.
    try:
        targets = opened.targets(teacher, corpus)
        return {
            "fields": targets.fields.to_json(),
            "encoding": targets.encoding.to_json(),
            **_committed(targets.committed),
        }
    except PotstillError as error:
        return {"error": {"kind": error.kind, "detail": error.detail}}


def _committed(committed: NDArray[np.bool_]) -> dict[str, Any]:
    return {"shards": len(committed), "shards_committed": int(committed.sum()), "committed": runs(committed)}


def _set(each: SegmentSet) -> dict[str, Any]:
    return {
        "fields": each.spec.fields.to_json(),
        "encoding": each.spec.encoding.to_json(),
        "committed": runs(each.commits.committed),
    }
