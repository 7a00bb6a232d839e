"""A manifest: all commits of a complete segment set in one Zarr group, so that 10^5 of them open at once.

    <set>/manifest.json        created if absent; names the group
    <set>/<manifest>/          arrays of S rows, a row for each shard

The commits that it was folded from stay where they are: a manifest is a faster way to the same records.

Shape legend:  S shards, N objects of the segment with the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.store import GroupReader, GroupWriter, Root, StoredObject
from potstill.cache.store.chunks import read_together
from potstill.cache.store.groups import attempt_name, objects_from_json, removed_on_failure
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.publishing import publish
from potstill.cache.store.record import Record, read_record, record_bytes, values_read
from potstill.cache.store.root import check_name
from potstill.cache.targets.commit import Commit
from potstill.cache.types import Provenance

_CHUNK_SHARDS = 512
# The 12 hex digits of `attempt_name`, and room for more.
_ATTEMPT_BYTES = 16
_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Shared:
    """Values that commits of one set share, kept once in the manifest's record; its rows index the tuples."""

    spec_sha256: str
    ranks_sha256: str
    layouts: tuple[tuple[str, ...], ...]
    """Lists of object paths that segments have; nearly always just one."""
    provenances: tuple[Provenance, ...]
    error_names: tuple[str, ...]


def fold(root: Root, set_path: str, commits: Sequence[Commit]) -> bool:
    """Write the manifest of all commits, which are given by shard; False when there is one already.

    Raises:
        StoreError: the store is full or cannot be written; the commits stay as they are.
    """
    group = attempt_name("manifest")
    path = f"{set_path}/{group}"
    shared = _shared(commits)
    with removed_on_failure(root, path):
        writer = GroupWriter(root, path)
        for name, array in _columns(commits, shared).items():
            writer.write(name, array, Layout((min(_CHUNK_SHARDS, len(array)), *array.shape[1:])))
        objects = writer.finish()
    record = {
        "group": group,
        "shards": len(commits),
        "spec_sha256": shared.spec_sha256,
        "ranks_sha256": shared.ranks_sha256,
        "layouts": shared.layouts,
        "provenances": shared.provenances,
        "error_names": shared.error_names,
        "objects": objects,
    }
    if publish(root, f"{set_path}/manifest.json", record_bytes("manifest", record), path, objects):
        return True
    root.delete(path)
    return False


class Manifest:
    """The folded commits of a complete set, read by range."""

    def __init__(self, reader: GroupReader, shared: _Shared, num_shards: int) -> None:
        self._reader = reader
        self._shared = shared
        self.num_shards = num_shards

    @classmethod
    def open(cls, root: Root, set_path: str, num_shards: int) -> Manifest | None:
        """Open the set's manifest; None when the set was not folded.

        Raises:
            FormatError: this version cannot read the record.
            CorruptSegment: it is damaged, or has another number of shards.
        """
        record = read_record(root, f"{set_path}/manifest.json", "manifest")
        if record is None:
            return None
        shared, group = _shared_from_json(f"{set_path}/manifest.json", record)
        if record.get("shards") != num_shards:
            raise CorruptSegment(f"{set_path}/manifest.json is of {record.get('shards')} shards, not of {num_shards}")
        reader = GroupReader(root, f"{set_path}/{group}", objects_from_json(record["objects"]))
        most = max(map(len, shared.layouts))
        for name, (width, dtype) in _column_types(most, len(shared.error_names)).items():
            reader.expect(name, (num_shards, *width), (dtype,))
        return cls(reader, shared, num_shards)

    def commits(self, start: int, stop: int) -> list[Commit]:
        """Read the commits of shards `start` to `stop`.

        Raises:
            CorruptSegment: stored bytes are damaged.
        """
        names = list(_column_types(0, 0))
        columns = read_together([self._reader.request(name, start, stop) for name in names])
        values = dict(zip(names, columns, strict=True))
        return [
            self._commit(start + row, {name: column[row] for name, column in values.items()})
            for row in range(stop - start)
        ]

    def holds(self, shard: int, commit: Commit | None) -> bool:
        """Tell whether the manifest's commit of a shard equals this one.

        Raises:
            CorruptSegment: stored bytes are damaged.
        """
        (folded,) = self.commits(shard, shard + 1)
        if commit is None:
            return False
        # Commits of format 1 have no `spec_sha256`; when a set has commits of both formats the manifest has it for all.
        return replace(commit, spec_sha256=commit.spec_sha256 or folded.spec_sha256) == folded

    def corrupt_objects(self) -> list[str]:
        """Read every object of the manifest; one line for each that is not what its record says."""
        return self._reader.corrupt_objects()

    def _commit(self, shard: int, row: dict[str, Any]) -> Commit:
        shared = self._shared
        try:
            paths = shared.layouts[row["layout"]]
            provenance = shared.provenances[row["provenance"]]
            attempt = bytes(row["attempt"]).rstrip(b"\0").decode("ascii")
        except (IndexError, ValueError) as error:
            raise CorruptSegment(f"{self._reader.path}: shard {shard} cannot be read: {error}") from error
        at = datetime.fromtimestamp(int(row["captured_at"]), UTC).isoformat(timespec="seconds")
        shas = (bytes(sha).hex() for sha in row["sha256s"])
        return Commit(
            shard=shard,
            segment=check_name("segment", f"{shard:06d}-{attempt}"),
            spec_sha256=shared.spec_sha256,
            ranks_sha256=shared.ranks_sha256,
            objects=tuple(
                StoredObject(path, int(size), sha) for path, size, sha in zip(paths, row["sizes"], shas, strict=False)
            ),
            provenance=replace(provenance, captured_at=at),
            error={name: float(value) for name, value in zip(shared.error_names, row["errors"], strict=False)},
        )


def _column_types(objects: int, errors: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "attempt": ((_ATTEMPT_BYTES,), "uint8"),
        "sizes": ((objects,), "int64"),
        "sha256s": ((objects, _SHA256_BYTES), "uint8"),
        # A set whose encoding loses nothing measures no error, and an array has at least one column.
        "errors": ((max(errors, 1),), "float64"),
        "layout": ((), "int32"),
        "provenance": ((), "int32"),
        "captured_at": ((), "int64"),
    }


def _shared(commits: Sequence[Commit]) -> _Shared:
    layouts = dict.fromkeys(tuple(item.path for item in commit.objects) for commit in commits)
    provenances = dict.fromkeys(replace(commit.provenance, captured_at="") for commit in commits)
    first = commits[0]
    # Empty for commits of format 1, and one value for all others of a set.
    spec = max(commit.spec_sha256 for commit in commits)
    return _Shared(spec, first.ranks_sha256, tuple(layouts), tuple(provenances), tuple(first.error))


def _columns(commits: Sequence[Commit], shared: _Shared) -> dict[str, NDArray[Any]]:
    most = max(map(len, shared.layouts))
    types = _column_types(most, len(shared.error_names))
    columns: dict[str, NDArray[Any]] = {
        name: np.zeros((len(commits), *width), dtype) for name, (width, dtype) in types.items()
    }
    for row, commit in enumerate(commits):
        attempt = commit.segment.partition("-")[2].encode()
        columns["attempt"][row, : len(attempt)] = np.frombuffer(attempt, np.uint8)
        columns["sizes"][row, : len(commit.objects)] = [item.size for item in commit.objects]
        for place, item in enumerate(commit.objects):
            columns["sha256s"][row, place] = np.frombuffer(bytes.fromhex(item.sha256), np.uint8)
        columns["errors"][row, : len(shared.error_names)] = [commit.error[name] for name in shared.error_names]
        columns["layout"][row] = shared.layouts.index(tuple(item.path for item in commit.objects))
        columns["provenance"][row] = shared.provenances.index(replace(commit.provenance, captured_at=""))
        columns["captured_at"][row] = datetime.fromisoformat(commit.provenance.captured_at).timestamp()
    return columns


def _shared_from_json(path: str, record: Record) -> tuple[_Shared, str]:
    with values_read(f"{path} is not the record of a manifest"):
        shared = _Shared(
            spec_sha256=str(record["spec_sha256"]),
            ranks_sha256=str(record["ranks_sha256"]),
            layouts=tuple(tuple(str(name) for name in layout) for layout in record["layouts"]),
            provenances=tuple(Provenance.from_json(value) for value in record["provenances"]),
            error_names=tuple(str(name) for name in record["error_names"]),
        )
        group = check_name("manifest", record["group"])
        objects_from_json(record["objects"])
    if not shared.layouts:
        raise FormatError(f"{path} is not the record of a manifest: it has no layouts")
    return shared, group
