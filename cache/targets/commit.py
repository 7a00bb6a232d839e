"""Commits: the records that make one segment the targets of a shard."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.cache.errors import CorruptSegment
from potstill.cache.store import StoredObject
from potstill.cache.store.groups import objects_from_json
from potstill.cache.store.record import Record, record_bytes, values_read
from potstill.cache.store.root import check_name
from potstill.cache.types import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The record that makes one segment a shard's targets."""

    shard: int
    segment: str
    spec_sha256: str
    """Hash of the set's stored spec, so that a commit of another set is refused; empty in format 1."""
    ranks_sha256: str
    """Hash of the rank table; empty when the set stores no ids."""
    objects: tuple[StoredObject, ...]
    provenance: Provenance
    error: dict[str, float]
    """Encoding error measured when the segment was written (`potstill.cache.encoding.logprobs.EncodingError`)."""

    @property
    def num_bytes(self) -> int:
        """Stored size of the segment."""
        return sum(item.size for item in self.objects)


def segment_path(set_path: str, segment: str) -> str:
    """Path of a segment below the root."""
    return f"{set_path}/segments/{segment}"


def commit_name(shard: int) -> str:
    """Name of a shard's record among a segment set's commits."""
    return f"{shard:06d}.json"


def shard_of_commit(commit_name: str) -> int | None:
    """Shard that a record's name means; None for the name of another object."""
    stem, dot, suffix = commit_name.partition(".")
    return int(stem) if dot and suffix == "json" and stem.isdecimal() else None


def commit_bytes(commit: Commit) -> bytes:
    """Bytes of the record as it is stored."""
    return record_bytes("commit", {name: getattr(commit, name) for name in Commit.__dataclass_fields__})


def commit_from_json(path: str, shard: int, record: Record) -> Commit:
    """Read the commit of a shard.

    Raises:
        FormatError: it is no commit. CorruptSegment: it is the commit of another shard.
    """
    with values_read(f"{path} is not a commit"):
        commit = Commit(
            shard=int(record["shard"]),
            segment=check_name("segment", record["segment"]),
            spec_sha256=str(record.get("spec_sha256", "")),
            ranks_sha256=str(record["ranks_sha256"]),
            objects=objects_from_json(record["objects"]),
            provenance=Provenance.from_json(record["provenance"]),
            error=dict(record["error"]),
        )
    if commit.shard != shard or not commit.segment.startswith(f"{shard:06d}-"):
        raise CorruptSegment(f"{path} is the commit of shard {commit.shard}, not of shard {shard}")
    return commit
