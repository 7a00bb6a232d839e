"""The spec of a segment set (teacher's identity, fields, encoding), and its record, `<set>/zarr.json`.

The record is created if absent, then only compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from potstill.cache.corpus import Corpus
from potstill.cache.encoding import Encoding
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import CorruptSegment, FormatError, SpecMismatch
from potstill.cache.store import Root
from potstill.cache.store.record import group_metadata, parse_group_metadata, values_read
from potstill.cache.targets.unshared_ids import UnsharedIds
from potstill.cache.types import Fields, TeacherIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSpec:
    """Content of one segment set; another spec under the same names is refused."""

    identity: TeacherIdentity
    fields: Fields
    encoding: Encoding
    unshared: UnsharedIds = field(default_factory=UnsharedIds)
    """Ids that mean other tokens to the teacher than to the corpus, and that no row uses."""

    @property
    def fill_options(self) -> str:
        """Options of `potstill prefill` and `fill` that mean exactly this spec's fields and encoding."""
        encoding = [] if self.encoding.name == "u8" else [f"--encoding {self.encoding.name}"]
        return " ".join([*self.fields.options, *encoding])

    @property
    def way_to_fill(self) -> str:
        """Commands that fill a set of this spec, in words."""
        return (
            "`potstill project`" if self.fields.alignment else f"`potstill prefill` or `fill` with {self.fill_options}"
        )


class SpecRecord:
    """The spec of one segment set, and the bytes that it is stored in once the set is begun."""

    def __init__(self, root: Root, path: str, corpus: Corpus, spec: SetSpec) -> None:
        self.root = root
        self.path = path
        self.corpus = corpus
        self.spec = spec
        self.sha256 = ""
        """Hash of the record's bytes; empty until the record was seen."""

    @classmethod
    def open(cls, root: Root, path: str, corpus: Corpus) -> SpecRecord | None:
        """Open the record of the set at `path`; None when there is none.

        Raises:
            SpecMismatch: it was made for another corpus of this name. FormatError, CorruptSegment: it is damaged.
        """
        data = root.get(f"{path}/zarr.json")
        if data is None:
            return None
        opened = cls(root, path, corpus, _parse_spec(path, data, corpus))
        opened.sha256 = hashlib.sha256(data).hexdigest()
        return opened

    @property
    def stores_ids(self) -> bool:
        """True when the set stores ids, and so needs a rank table."""
        return bool(self.spec.fields.k or self.spec.fields.draws)

    def is_begun(self) -> bool:
        """Tell whether the record exists.

        Raises:
            SpecMismatch: another job made the set with another spec since this one was planned.
        """
        if not self.sha256:
            data = self.root.get(f"{self.path}/zarr.json")
            if data is None:
                return False
            require_same(self.path, self.spec, _parse_spec(self.path, data, self.corpus))
            self.sha256 = hashlib.sha256(data).hexdigest()
        return True

    def publish(self) -> None:
        """Create the record, unless it exists.

        Raises:
            SpecMismatch: the set exists with another spec. StoreError: the store is full or cannot be written.
        """
        if self.is_begun():
            return
        record: dict[str, Any] = {
            "teacher": self.path.split("/")[1],
            "corpus": {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint},
            "identity": self.spec.identity.to_json(),
            "fields": self.spec.fields.to_json(),
            "encoding": self.spec.encoding.to_json(),
        }
        if self.spec.unshared:
            record["unshared_ids"] = self.spec.unshared.to_json()
        self.root.create(f"{self.path}/zarr.json", group_metadata("targets", record))
        # Whoever won the race, the record that is there now decides.
        begun = self.is_begun()
        assert begun, "a created spec cannot vanish"

    def require_unchanged(self) -> None:
        """Check that the set is still the one that was begun.

        Raises:
            SpecMismatch: it was deleted meanwhile, and perhaps begun anew.
        """
        data = self.root.get(f"{self.path}/zarr.json")
        if data is None or hashlib.sha256(data).hexdigest() != self.sha256:
            raise SpecMismatch(
                f"{self.path} was deleted while it was filled; run the same command again to fill it anew"
            )


def require_same(path: str, wanted: SetSpec, found: SetSpec) -> None:
    """Refuse to write one spec's targets into a set of another.

    Raises:
        SpecMismatch: identity, fields or encoding differ; the message lists the differences.
    """
    differences = found.identity.differences(wanted.identity)
    for name in ("fields", "encoding"):
        mine, theirs = getattr(found, name).to_json(), getattr(wanted, name).to_json()
        if mine != theirs:
            # A field that is not asked for may be left out.
            changed = [
                f"{key}: {mine.get(key, False)} != {theirs.get(key, False)}"
                for key in mine | theirs
                if mine.get(key, False) != theirs.get(key, False)
            ]
            differences += ("; " if differences else "") + f"{name}: {', '.join(changed)}"
    if differences:
        raise SpecMismatch(
            f"{path} exists with another spec ({differences}); use another teacher name, or `potstill delete` it first"
        )


def _parse_spec(path: str, data: bytes, corpus: Corpus) -> SetSpec:
    """Read the spec from the bytes of a segment set's record.

    Raises:
        FormatError: it is no such record. CorruptSegment: it is damaged, or another set's.
        SpecMismatch: it was made for another corpus of this name.
    """
    record = parse_group_metadata(path, data, "targets")
    with values_read(f"{path}/zarr.json is not the record of a segment set"):
        spec = SetSpec(
            identity=TeacherIdentity.from_json(record["identity"]),
            fields=Fields.from_json(record["fields"]),
            encoding=encoding_by_name(record["encoding"]["name"]),
            unshared=UnsharedIds.from_json(record.get("unshared_ids")),
        )
        teacher, (name, fingerprint) = record["teacher"], (record["corpus"]["name"], record["corpus"]["fingerprint"])
        if not isinstance(fingerprint, str):
            raise FormatError(f"the fingerprint of its corpus is {fingerprint!r}")
    if path.split("/")[1:3] != [teacher, name]:
        raise CorruptSegment(f"{path}/zarr.json is the record of teacher {teacher!r} on corpus {name!r}")
    if fingerprint != corpus.fingerprint:
        raise SpecMismatch(
            f"{path} was made for a corpus {corpus.name!r} of fingerprint {fingerprint[:12]}, "
            f"this one has {corpus.fingerprint[:12]}; use another corpus name"
        )
    return spec
