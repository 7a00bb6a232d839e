"""The spec of a segment set (teacher's identity, fields, encoding), and how its record is read."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.cache.corpus import Corpus
from potstill.cache.encoding import Encoding
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import CorruptSegment, FormatError, InvalidInput, SpecMismatch
from potstill.cache.store.record import parse_group_metadata
from potstill.cache.types import Fields, TeacherIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSpec:
    """Content of one segment set; another spec under the same names is refused."""

    identity: TeacherIdentity
    fields: Fields
    encoding: Encoding

    @property
    def fill_options(self) -> str:
        """Options of `potstill prefill` and `fill` that mean exactly this spec's fields and encoding."""
        encoding = [] if self.encoding.name == "u8" else [f"--encoding {self.encoding.name}"]
        return " ".join([*self.fields.options, *encoding])


def require_same(path: str, wanted: SetSpec, found: SetSpec) -> None:
    """Refuse to write one spec's targets into a set of another.

    Raises:
        SpecMismatch: identity, fields or encoding differ; the message lists the differences.
    """
    differences = found.identity.differences(wanted.identity)
    for name in ("fields", "encoding"):
        mine, theirs = getattr(found, name).to_json(), getattr(wanted, name).to_json()
        if mine != theirs:
            changed = [f"{key}: {mine[key]} != {theirs[key]}" for key in mine if mine[key] != theirs[key]]
            differences += ("; " if differences else "") + f"{name}: {', '.join(changed)}"
    if differences:
        raise SpecMismatch(f"{path} exists with another spec ({differences}); use another teacher name")


def parse_spec(path: str, data: bytes, corpus: Corpus) -> SetSpec:
    """Read the spec from the bytes of a segment set's record.

    Raises:
        FormatError: it is no such record. CorruptSegment: it is damaged, or another set's.
        SpecMismatch: it was made for another corpus of this name.
    """
    record = parse_group_metadata(path, data, "targets")
    try:
        spec = SetSpec(
            identity=TeacherIdentity.from_json(record["identity"]),
            fields=Fields.from_json(record["fields"]),
            encoding=encoding_by_name(record["encoding"]["name"]),
        )
        teacher, (name, fingerprint) = record["teacher"], (record["corpus"]["name"], record["corpus"]["fingerprint"])
        if not isinstance(fingerprint, str):
            raise FormatError(f"the fingerprint of its corpus is {fingerprint!r}")
    except (KeyError, TypeError, InvalidInput, FormatError) as error:
        raise FormatError(f"{path}/zarr.json is not the record of a segment set: {error}") from error
    if path.split("/")[1:3] != [teacher, name]:
        raise CorruptSegment(f"{path}/zarr.json is the record of teacher {teacher!r} on corpus {name!r}")
    if fingerprint != corpus.fingerprint:
        raise SpecMismatch(
            f"{path} was made for a corpus {corpus.name!r} of fingerprint {fingerprint[:12]}, "
            f"this one has {corpus.fingerprint[:12]}; use another corpus name"
        )
    return spec
