"""Annotations: named, sealed per-row arrays beside a corpus, such as which rows are contaminated or held out.

    corpora/<corpus>/annotations/<name>.json      record: names group and corpus fingerprint; created if absent
    corpora/<corpus>/annotations/<name>-<hex>/    values [R]

A corpus is never rewritten, so later findings about its rows lie beside it, with their own provenance.

Shape legend:  R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import AlreadyExists, FormatError, InvalidInput, NotFound, SpecMismatch
from potstill.cache.plurals import counted
from potstill.cache.store import GroupReader, GroupWriter, Root, StoredObject
from potstill.cache.store.groups import attempt_name, objects_from_json, removed_on_failure
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.publishing import publish
from potstill.cache.store.record import read_record, record_bytes, values_read
from potstill.cache.store.root import check_name, is_name

CONTAMINATED = "contaminated"
"""Name of the annotation of rows with items of benchmarks; further ones are called `contaminated-…`."""
_KIND = "annotation"
_DTYPES = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64"]
)
_CHUNK = 1 << 16
_OBJECT_ROWS = 1 << 24
# The group's name is the annotation's and 13 characters more, and must itself fit into the 64 of a name.
_LONGEST_NAME = 51


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """Content of the record of an annotation."""

    name: str
    group: str
    """Name of the group beside the record that holds the values."""
    corpus_fingerprint: str
    dtype: str
    num_rows: int
    provenance: Mapping[str, str]
    """Origin of the values in their maker's words: source, tool, settings."""
    objects: tuple[StoredObject, ...]


@dataclass(frozen=True, slots=True)
class AnnotatedCorpus:
    """A corpus as its annotations know it: its path below the root, its name, the sha256 of its content, its rows."""

    path: str
    name: str
    fingerprint: str
    num_rows: int

    @property
    def folder(self) -> str:
        """Path of its annotations below the root."""
        return f"{self.path}/annotations"


def annotate(
    root: Root, corpus: AnnotatedCorpus, name: str, values: NDArray[Any], provenance: Mapping[str, str]
) -> Annotation:
    """Store one value for each row of a corpus, [R], under a new name.

    Raises:
        InvalidInput: there is not one value a row, their dtype is not bool, int or float, or the name is no name.
        AlreadyExists: the corpus has an annotation of this name. StoreError: the store is full; nothing is left.
    """
    require_name(name)
    values = _storable(corpus, name, values)
    path = f"{corpus.folder}/{name}.json"
    taken = AlreadyExists(f"corpus {corpus.name!r} has an annotation {name!r}; annotate under another name")
    if root.get(path) is not None:
        raise taken
    group = attempt_name(name)
    with removed_on_failure(root, f"{corpus.folder}/{group}"):
        objects = _write_values(root, f"{corpus.folder}/{group}", values)
    annotation = Annotation(
        name=name,
        group=group,
        corpus_fingerprint=corpus.fingerprint,
        dtype=values.dtype.name,
        num_rows=len(values),
        provenance=dict(provenance),
        objects=objects,
    )
    # From here on the record may name the group, also when `create` raises: it is not ours to delete.
    if not publish(root, path, record_bytes(_KIND, _to_json(annotation)), f"{corpus.folder}/{group}", objects):
        root.delete(f"{corpus.folder}/{group}")
        raise taken
    return annotation


def list_annotations(root: Root, corpus: AnnotatedCorpus) -> list[str]:
    """Names of a corpus' annotations, sorted."""
    names = (name.removesuffix(".json") for name in root.objects(corpus.folder) if name.endswith(".json"))
    return sorted(name for name in names if is_name(name))


def open_annotation(root: Root, corpus: AnnotatedCorpus, name: str) -> Annotation:
    """Read the record of an annotation.

    Raises:
        NotFound: the corpus has none of this name. SpecMismatch: it was made for another corpus of the same name.
        FormatError, CorruptSegment: this version cannot read the record, or it is damaged.
    """
    require_name(name)
    path = f"{corpus.folder}/{name}.json"
    record = read_record(root, path, _KIND)
    if record is None:
        known = ", ".join(list_annotations(root, corpus)) or "none"
        raise NotFound(f"corpus {corpus.name!r} has no annotation {name!r}; there are: {known}")
    annotation = _from_json(path, record)
    if annotation.name != name:
        raise SpecMismatch(f"{path} is the record of annotation {annotation.name!r}; put it back under its own name")
    if annotation.corpus_fingerprint != corpus.fingerprint or annotation.num_rows != corpus.num_rows:
        raise SpecMismatch(
            f"{path} was made for a corpus of fingerprint {annotation.corpus_fingerprint[:12]} and "
            f"{annotation.num_rows} rows, {corpus.name!r} has {corpus.fingerprint[:12]} and {corpus.num_rows}; "
            "annotate this one again"
        )
    return annotation


def read_annotation(
    root: Root, corpus: AnnotatedCorpus, name: str, start: int = 0, stop: int | None = None
) -> NDArray[Any]:
    """Read the values of all rows, or of rows `start` to `stop`; raises as `open_annotation` does."""
    annotation = open_annotation(root, corpus, name)
    reader = GroupReader(root, f"{corpus.folder}/{annotation.group}", annotation.objects)
    reader.expect("values", (annotation.num_rows,), (annotation.dtype,))
    return reader.read("values", start, corpus.num_rows if stop is None else stop)


def says_contaminated(name: str) -> bool:
    """Tell by an annotation's name whether training leaves its rows out where nobody says otherwise."""
    return name == CONTAMINATED or name.startswith(f"{CONTAMINATED}-")


def require_name(name: str) -> None:
    """Check that an annotation may be called so.

    Raises:
        InvalidInput: it may not.
    """
    check_name("annotation", name)
    if len(name) > _LONGEST_NAME:
        raise InvalidInput(f"annotation name {name!r} has {len(name)} characters; the limit is {_LONGEST_NAME}")


def _storable(corpus: AnnotatedCorpus, name: str, values: NDArray[Any]) -> NDArray[Any]:
    if values.shape != (corpus.num_rows,):
        raise InvalidInput(
            f"annotation {name!r} has values of shape {list(values.shape)}, corpus {corpus.name!r} has "
            f"{counted(corpus.num_rows, 'row')}; give one value a row"
        )
    if values.dtype.name not in _DTYPES:
        raise InvalidInput(f"annotation {name!r} is {values.dtype}; take bool, int8 to int64, float32 or float64")
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _write_values(root: Root, path: str, values: NDArray[Any]) -> tuple[StoredObject, ...]:
    writer = GroupWriter(root, path)
    array = writer.array("values", values.shape, values.dtype, Layout((_CHUNK,), min(_OBJECT_ROWS, len(values))))
    for start in range(0, len(values), _OBJECT_ROWS):
        writer.put(array, start, np.ascontiguousarray(values[start : start + _OBJECT_ROWS]))
    return writer.finish()


def _to_json(annotation: Annotation) -> dict[str, Any]:
    return {
        "name": annotation.name,
        "group": annotation.group,
        "corpus": {"fingerprint": annotation.corpus_fingerprint, "rows": annotation.num_rows},
        "dtype": annotation.dtype,
        "provenance": dict(annotation.provenance),
        "objects": annotation.objects,
    }


def _from_json(path: str, record: dict[str, Any]) -> Annotation:
    with values_read(f"{path} is not the record of an annotation"):
        annotation = Annotation(
            name=str(record["name"]),
            group=check_name("annotation group", record["group"]),
            corpus_fingerprint=str(record["corpus"]["fingerprint"]),
            dtype=str(record["dtype"]),
            num_rows=int(record["corpus"]["rows"]),
            provenance={str(key): str(value) for key, value in record["provenance"].items()},
            objects=objects_from_json(record["objects"]),
        )
    if annotation.dtype not in _DTYPES:
        raise FormatError(f"{path} has values of {annotation.dtype!r}, which no annotation has")
    return annotation
