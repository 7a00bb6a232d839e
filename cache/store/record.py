"""Records: the small JSON objects that make immutable groups part of a cache.

A record carries its format version, so that older software refuses it by name. From format 2 on it carries the
sha256 of its own content too, so that no byte of it can change unseen. The record of a group itself lies in the
attributes of its `zarr.json`, under the key `potstill`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from potstill.cache.errors import CorruptSegment, FormatError, InvalidInput
from potstill.cache.store.root import Root

_HASH = "record_sha256"

Record = dict[str, Any]


def record_bytes(kind: str, record: Record) -> bytes:
    """Bytes of a record with its format version, kind and own sha256, as JSON with sorted keys."""
    return _record_json(_sealed(kind, record))


def group_metadata(kind: str, record: Record) -> bytes:
    """Bytes of the `zarr.json` of a Zarr v3 group that has the record in its attributes."""
    return _group_json(_sealed(kind, record))


def read_record(root: Root, path: str, kind: str) -> Record | None:
    """Read and check a record; None when there is none.

    Raises:
        FormatError: it is not JSON, of another kind, or of a newer format. CorruptSegment: it was changed.
    """
    data = root.get(path)
    return None if data is None else _checked(_parse(path, data), path, kind, data, _record_json)


def read_group_metadata(root: Root, path: str, kind: str) -> Record | None:
    """Read and check the record in a group's `zarr.json`; see `read_record`."""
    data = root.get(f"{path}/zarr.json")
    return None if data is None else parse_group_metadata(path, data, kind)


def parse_group_metadata(path: str, data: bytes, kind: str) -> Record:
    """Check the record in the bytes of a group's `zarr.json`; raises as `read_record` does."""
    attributes = _parse(f"{path}/zarr.json", data).get("attributes")
    record = attributes.get("potstill") if isinstance(attributes, dict) else None
    return _checked(record, f"{path}/zarr.json", kind, data, _group_json)


@contextmanager
def values_read(what: str) -> Iterator[None]:
    """Turn what a record's missing keys and wrong values raise in the block into `FormatError`, `what` in front."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, FormatError, InvalidInput) as error:
        raise FormatError(f"{what}: {error!r}") from error


def _sealed(kind: str, record: Record) -> Record:
    content = {"format": format_version(kind), "kind": kind, **record}
    return {**content, _HASH: _content_sha256(content)}


def format_version(kind: str) -> int:
    """Newest format that changed a kind of record, in which it is written: older software goes on reading the rest."""
    return 3 if kind == "corpus" else 2


def _plain(value: Any) -> Any:
    """Spell a value that JSON does not know: by its own `to_json`, or a dataclass as an object of its attributes."""
    return value.to_json() if hasattr(value, "to_json") else asdict(value)


def _content_sha256(content: Record) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _record_json(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, indent=1, default=_plain).encode()


def _group_json(record: Record) -> bytes:
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {"potstill": record}}
    return json.dumps(metadata, sort_keys=True, indent=1, default=_plain).encode()


def _parse(path: str, data: bytes) -> Record:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object")
    return value


def _checked(record: Any, path: str, kind: str, data: bytes, written: Callable[[Record], bytes]) -> Record:
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        raise FormatError(f"{path} was not written by potstill: it has no format version")
    newest = format_version(kind)
    if record["format"] > newest:
        raise FormatError(
            f"{path} has format {record['format']}, this version reads up to {newest}; install a newer potstill"
        )
    if record.get("kind") != kind:
        raise FormatError(f"{path} is a record of kind {record.get('kind')!r}, not {kind!r}")
    content = {key: value for key, value in record.items() if key != _HASH}
    if record["format"] == 1 and _HASH not in record:
        return content
    # Comparing all bytes, not only the content's hash, also finds a flip that JSON does not notice.
    if record.get(_HASH) != _content_sha256(content) or written(record) != data:
        raise CorruptSegment(f"{path} is damaged: its content is not what its own sha256 says")
    return content
