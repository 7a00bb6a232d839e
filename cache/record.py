"""Records: the small JSON objects that make immutable groups part of a cache.

Each carries the format version, so that a cache written by a newer format is refused by name.
A group's own record is its `zarr.json`; its attributes hold ours under the key `potstill`.
"""

from __future__ import annotations

import json
from typing import Any

from cache.errors import FormatError
from cache.store import Root

FORMAT_VERSION = 1


def record_bytes(kind: str, record: dict[str, Any]) -> bytes:
    """A record with its format version and kind, as sorted JSON."""
    return json.dumps({"format": FORMAT_VERSION, "kind": kind, **record}, sort_keys=True, indent=1).encode()


def group_metadata(kind: str, record: dict[str, Any]) -> bytes:
    """The `zarr.json` of a Zarr v3 group with the record in its attributes."""
    attributes = {"potstill": {"format": FORMAT_VERSION, "kind": kind, **record}}
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(metadata, sort_keys=True, indent=1).encode()


def read_record(root: Root, path: str, kind: str) -> dict[str, Any] | None:
    """A record, or None when there is none.

    Raises:
        FormatError: not JSON, of another kind, or of a newer format.
    """
    data = root.get(path)
    return None if data is None else _checked(_parse(path, data), path, kind)


def read_group_metadata(root: Root, path: str, kind: str) -> dict[str, Any] | None:
    """The record in a group's `zarr.json`; see `read_record`."""
    data = root.get(f"{path}/zarr.json")
    if data is None:
        return None
    attributes = _parse(f"{path}/zarr.json", data).get("attributes")
    record = attributes.get("potstill") if isinstance(attributes, dict) else None
    return _checked(record, f"{path}/zarr.json", kind)


def _parse(path: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object")
    return value


def _checked(record: Any, path: str, kind: str) -> dict[str, Any]:
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise FormatError(f"{path} was not written by potstill: it has no format version")
    if record["format"] > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {record['format']}, this version reads up to {FORMAT_VERSION}; install a newer potstill"
        )
    if record.get("kind") != kind:
        raise FormatError(f"{path} is a record of kind {record.get('kind')!r}, not {kind!r}")
    return record
