"""Faults to put into a cache: what decaying disks, careless copies and hostile writers leave behind.

A fault is a set of objects with their new bytes. Only `lies` have hashes that fit: they are what a writer with the
right to write could leave, so a reader must survive them, but need not notice one that changes no number.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import google_crc32c

from potstill.cache.store.record import group_metadata, record_bytes

Objects = Mapping[str, bytes]

_HOSTILE_NAMES = ("../../escape", "/etc/passwd", "", "a" * 5000, "nul\0", "x/../../y")
_NOT_NUMBERS: tuple[Any, ...] = (None, "x", [], {}, True, 1.5)
_NUMBERS = (-1, 0, 2**31, 2**63, 10**30)
_GONE = object()


@dataclass(frozen=True, slots=True)
class Fault:
    """New bytes of some objects by path, None for an object that is deleted."""

    name: str
    kind: str
    """Kind of the first changed object."""
    changes: Mapping[str, bytes | None]

    @property
    def lies(self) -> bool:
        """True where all hashes fit all the same."""
        return self.name.startswith("lie")


def kind_of(path: str) -> str:
    """The kind of an object, by its path."""
    top, *middle, name = path.split("/")
    if name.endswith(".json") and name != "zarr.json":
        record = {"ranks.json": "ranks record", "manifest.json": "manifest record"}.get(name)
        of_folder = {"commits": "commit", "annotations": "annotation record"}.get(middle[-1], "journal record")
        return record or of_folder
    if name == "zarr.json" and top == "corpora" and len(middle) == 1:
        return "corpus seal"
    if name == "zarr.json" and top == "targets" and (len(middle) == 2 or middle[-2] == "sets"):
        return "set record"
    what = "metadata" if name == "zarr.json" else "checksums" if "checksums" in middle else "chunks"
    for word in ("segments", "annotations"):
        if word in middle:
            return f"{word.removesuffix('s')} {what}"
    if top == "targets":
        return f"{'ranks' if any(part.startswith('ranks-') for part in middle) else 'manifest'} {what}"
    return f"{'corpus' if top == 'corpora' else 'journal'} {what}"


def flips(objects: Objects, count: int, choose: random.Random) -> Iterator[Fault]:
    """One bit or one byte of an object, all kinds of object in turn."""
    kinds = defaultdict(list)
    for path, data in objects.items():
        if data:
            kinds[kind_of(path)].append(path)
    for number in range(count):
        path = choose.choice(kinds[sorted(kinds)[number % len(kinds)]])
        damaged = bytearray(objects[path])
        damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8) if number % 3 else choose.randrange(1, 256)
        yield Fault("flip", kind_of(path), {path: bytes(damaged)})


def cuts(objects: Objects, choose: random.Random) -> Iterator[Fault]:
    """Every object cut short, made longer, and deleted."""
    for path, data in objects.items():
        kind = kind_of(path)
        yield Fault("truncate", kind, {path: data[: choose.choice((0, len(data) // 2, len(data) - 1))]})
        yield Fault("extend", kind, {path: data + choose.choice((b"\0", b" ", b"\n", data[-16:]))})
        yield Fault("delete", kind, {path: None})


def copies(objects: Objects, choose: random.Random) -> Iterator[Fault]:
    """Every object overwritten by each other of its size, and by one of its kind of any size."""
    for one, other in same_size(objects):
        yield Fault("duplicate", kind_of(one), {one: objects[other]})
        yield Fault("duplicate", kind_of(other), {other: objects[one]})
    kinds = defaultdict(list)
    for path in objects:
        kinds[kind_of(path)].append(path)
    for path, data in objects.items():
        others = [other for other in kinds[kind_of(path)] if objects[other] != data]
        if others:
            yield Fault("overwrite", kind_of(path), {path: objects[choose.choice(others)]})


def swaps(objects: Objects) -> Iterator[Fault]:
    """Every pair of objects of one size and different content, exchanged."""
    for one, other in same_size(objects):
        yield Fault("swap", kind_of(one), {one: objects[other], other: objects[one]})


def same_size(objects: Objects) -> Iterator[tuple[str, str]]:
    """Pairs of objects of one size and different content."""
    sizes = defaultdict(list)
    for path, data in objects.items():
        sizes[len(data)].append(path)
    for paths in sizes.values():
        yield from ((one, other) for one, other in combinations(paths, 2) if objects[one] != objects[other])


def group_swaps(objects: Objects) -> Iterator[Fault]:
    """Whole segments, annotations and journal segments exchanged with another that has the same arrays."""
    groups: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path, data in objects.items():
        parent, inside = _group_of(path)
        if parent:
            groups[parent][inside] = data
    for one, other in combinations(sorted(groups), 2):
        if set(groups[one]) == set(groups[other]) and groups[one] != groups[other]:
            ours = {f"{one}/{inside}": data for inside, data in groups[other].items()}
            theirs = {f"{other}/{inside}": data for inside, data in groups[one].items()}
            yield Fault("swap groups", kind_of(next(iter(ours))), {**ours, **theirs})


def _group_of(path: str) -> tuple[str, str]:
    parts = path.split("/")
    for index, part in enumerate(parts[:-1]):
        if index and "-" in part and parts[index - 1] in ("segments", "annotations"):
            return "/".join(parts[: index + 1]), "/".join(parts[index + 1 :])
    if parts[0] == "journal" and len(parts) > 3:
        return "/".join(parts[:3]), "/".join(parts[3:])
    return "", ""


def lying_records(objects: Objects) -> Iterator[Fault]:
    """Every value of every record replaced by what no writer means, sealed again with a hash that fits."""
    for path, data in objects.items():
        if not kind_of(path).endswith(("record", "seal", "commit")):
            continue
        for at, content in _mutations(_content(path, data)):
            if isinstance(content, dict):
                yield Fault(f"lie: {_word(at)}", kind_of(path), {path: _sealed(path, content)})


def lying_arrays(objects: Objects) -> Iterator[Fault]:
    """Metadata of arrays that lies, and chunks that claim to be huge, with records that have their hashes."""
    for record_path, data in objects.items():
        if kind_of(record_path) not in ("corpus seal", "commit", "ranks record", "annotation record", "journal record"):
            continue
        content = _content(record_path, data)
        group = _group_path(record_path, content)
        for item in content["objects"]:
            path = f"{group}/{item['path']}"
            made = _lying_metadata if item["path"].endswith("zarr.json") else _bombs
            for name, changed in made(objects[path]):
                entry = {"path": item["path"], "size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
                listed = [entry if each is item else each for each in content["objects"]]
                sealed = _sealed(record_path, {**content, "objects": listed})
                yield Fault(f"lie: {name}", kind_of(path), {path: changed, record_path: sealed})


def _content(path: str, data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    if path.endswith("/zarr.json"):
        record = record["attributes"]["potstill"]
    return {key: value for key, value in record.items() if key not in ("record_sha256", "format", "kind")}


def _sealed(path: str, content: dict[str, Any]) -> bytes:
    kind = kind_of(path).split()[0]
    if path.endswith("/zarr.json"):
        return group_metadata("corpus" if kind == "corpus" else "targets", content)
    return record_bytes(kind, content)


def _group_path(record_path: str, content: Mapping[str, Any]) -> str:
    folder, _, name = record_path.rpartition("/")
    if "segment" in content:
        return f"{folder.rpartition('/')[0]}/segments/{content['segment']}"
    if name == "zarr.json":
        return f"{folder}/{content['data']}"
    return f"{folder}/{content['group']}" if "group" in content else record_path.removesuffix(".json")


def _mutations(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Copies of a JSON value, each with one part of it changed; of long lists the ends only."""
    if isinstance(value, dict):
        for key, item in value.items():
            rest = {other: each for other, each in value.items() if other != key}
            yield (*at, key, "gone"), rest
            for where, changed in _mutations(item, (*at, key)):
                yield where, {**value, key: changed}
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            for where, changed in _mutations(value[index], (*at, index)):
                yield where, [*value[:index], changed, *value[index + 1 :]]
        yield (*at, "empty"), []
        yield (*at, "twice"), [*value, *value]
    for bad in _bad_values(value):
        if bad != value or type(bad) is not type(value):
            yield (*at, "bad"), bad


def _bad_values(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        return (*_HOSTILE_NAMES, *_NOT_NUMBERS[:1], 7)
    if isinstance(value, int | float):
        return (*_NUMBERS, *_NOT_NUMBERS)
    return (None, 7, "x")


def _lying_metadata(data: bytes) -> Iterator[tuple[str, bytes]]:
    metadata = json.loads(data)
    if metadata.get("node_type") != "array":
        return
    for shape in ([-1], [2**62], [2**31, 2**31], [0], [], ["x"], None):
        yield "shape", json.dumps({**metadata, "shape": shape}).encode()
    for dtype in ("float64", "int8", "string", {"name": "no"}, "../x"):
        yield "dtype", json.dumps({**metadata, "data_type": dtype}).encode()
    ndim = len(metadata["shape"])
    for size in (0, -1, 1, 2**40):
        grid = {"name": "regular", "configuration": {"chunk_shape": [size] * ndim}}
        yield "grid", json.dumps({**metadata, "chunk_grid": grid}).encode()
        inner = json.loads(data)
        inner["codecs"][0]["configuration"]["chunk_shape"] = [size] * ndim
        yield "inner chunk", json.dumps(inner).encode()
    for codecs in ([], [{"name": "bytes"}], [{"name": "no-such"}], None):
        yield "codecs", json.dumps({**metadata, "codecs": codecs}).encode()
    lies: tuple[Any, ...] = (
        {"chunks": {"ids": -5}},
        {"chunks": {"x": 10**30}},
        {"chunks": []},
        {"chunks": {"x": "y"}},
        [],
    )
    for attributes in lies:
        yield "attributes", json.dumps({**metadata, "attributes": attributes}).encode()
    yield "fill value", json.dumps({**metadata, "fill_value": "no"}).encode()
    yield "not JSON", data[:-5]
    yield "deep", b"[" * 100_000


def _bombs(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The first chunk claims sizes that it has not, with checksums that fit; the index does the same."""
    index = _index(data)
    if index is None:
        return
    start, entries = index
    offset, length = entries[0]
    chunk = data[offset : offset + length - 4]
    for claimed in (2**31 - 1, 2**30, 0, 1, 2**32 - 1):
        header = chunk[:4] + struct.pack("<I", claimed) + chunk[8:]
        block = struct.pack("<I", min(claimed, 2**31 - 1))
        for name, made in (("decoded size", header), ("block size", chunk[:8] + block + chunk[12:])):
            sealed = made + struct.pack("<I", google_crc32c.value(made))
            yield f"bomb, {name}", data[:offset] + sealed + data[offset + length :]
    for place in ((2**63, 16), (0, 2**62), (2**64 - 1, 2**64 - 1), (start, 2**31), (offset, 0)):
        changed = struct.pack("<QQ", *place) + data[start + 16 : -4]
        yield "bomb, index", data[:start] + changed + struct.pack("<I", google_crc32c.value(changed))


def _index(data: bytes) -> tuple[int, list[tuple[int, int]]] | None:
    """Find the index of a shard object: its first byte, and its entries. It lies behind the chunks."""
    for chunks in range(1, len(data) // 16 + 1):
        start = len(data) - 4 - 16 * chunks
        if start < 0:
            return None
        (stored,) = struct.unpack("<I", data[-4:])
        if google_crc32c.value(data[start:-4]) == stored:
            return start, list(struct.iter_unpack("<QQ", data[start:-4]))
    return None


def _word(at: tuple[str | int, ...]) -> str:
    """The keys on the way to a place in a record, without indexes of lists."""
    return ".".join(str(part) for part in at[:-1] if not isinstance(part, int)) or "all"
