"""Where bytes live: a local folder, `s3://`, `gs://`, `az://` or `memory://`, behind one small class.

The only importer of obstore. Two guarantees are made here and used everywhere: `create` puts an object
only if there is none and reports who won, and `flush` returns only when what was written before it
survives a power cut (object stores promise that on every put; a local folder has to be told).
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from cache.errors import InvalidInput, StoreError

_HASH_BLOCK = 4 << 20

TEMPORARY = ".potstill-tmp"
"""Folder of a local root in which a record is completed before it appears under its name."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object below a group: its path relative to the group, its size in bytes and its content's hash."""

    path: str
    size: int
    sha256: str


class Root:
    """The root of a cache. Paths are relative to it and use `/`."""

    def __init__(self, url: str, store: Any, folder: Path | None) -> None:
        self.url = url
        self.store = store
        """The obstore store: what zarr's `ObjectStore` wraps."""
        self._folder = folder

    @classmethod
    def open(cls, url: str | Path, *, create: bool = False) -> Self:
        """Open a root by path or URL.

        Raises:
            InvalidInput: a local folder that does not exist, unless `create`; an unknown URL scheme.
        """
        text = str(url)
        if "://" not in text:
            folder = Path(text).expanduser().absolute()
            if create:
                with _translated(text):
                    folder.mkdir(parents=True, exist_ok=True)
            if not folder.is_dir():
                raise InvalidInput(f"no cache at {text!r}: the folder does not exist; `potstill ingest` makes one")
            return cls(text, LocalStore(folder), folder)
        try:
            return cls(text, from_url(text), None)
        except (BaseError, ValueError) as error:
            raise InvalidInput(f"cannot open {text!r}: {error}") from error

    def get(self, path: str) -> bytes | None:
        """The bytes of an object, or None when there is none."""
        with _translated(path):
            try:
                return bytes(obstore.get(self.store, path).bytes())
            except FileNotFoundError:
                return None

    def create(self, path: str, data: bytes) -> bool:
        """Put an object only if there is none; whether the object there is now this one.

        True also when an earlier try put it and only its answer was lost. When this raises, the object may
        exist all the same: what it names must not be deleted.
        """
        with _translated(path):
            if self._folder is not None:
                created = _create_file(self._folder, self._folder / path, data)
            else:
                created = _put_new(self.store, path, data)
        return created or self.get(path) == data

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of every object below `prefix`, by its path relative to `prefix`."""
        with _translated(prefix):
            batches = obstore.list(self.store, prefix)
            return {meta["path"][len(prefix) + 1 :]: int(meta["size"]) for batch in batches for meta in batch}

    def seconds_since_write(self, prefix: str) -> float | None:
        """Seconds since anything below `prefix` was last written, by the store's clock; None when there is nothing."""
        with _translated(prefix):
            times = [meta["last_modified"] for batch in obstore.list(self.store, prefix) for meta in batch]
        return (datetime.now(UTC) - max(times)).total_seconds() if times else None

    def folders(self, prefix: str) -> list[str]:
        """Names directly below `prefix` that hold objects and that this project could have given, sorted."""
        with _translated(prefix):
            listing = obstore.list_with_delimiter(self.store, prefix)
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in listing["common_prefixes"])
        return sorted(name for name in names if is_name(name))

    def objects(self, prefix: str) -> list[str]:
        """Names of the objects directly below `prefix`, sorted; hidden ones are left out."""
        with _translated(prefix):
            listing = obstore.list_with_delimiter(self.store, prefix)
        names = (meta["path"].rsplit("/", 1)[-1] for meta in listing["objects"])
        return sorted(name for name in names if not name.startswith("."))

    def sha256(self, path: str) -> str:
        """The hash of an object's bytes, in hex, read in blocks."""
        digest = hashlib.sha256()
        with _translated(path):
            for block in obstore.get(self.store, path).stream(min_chunk_size=_HASH_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def delete(self, prefix: str) -> None:
        """Remove every object below `prefix`, and the empty folders a local root is left with."""
        paths = [f"{prefix}/{path}" for path in self.sizes(prefix)]
        with _translated(prefix):
            if paths:
                obstore.delete(self.store, paths)
            if self._folder is not None:
                _remove_empty_folders(self._folder / prefix)

    def flush(self, prefix: str) -> None:
        """Return when everything below `prefix` is on stable storage."""
        if self._folder is None:
            return
        with _translated(prefix):
            for parent, _, files in os.walk(self._folder / prefix):
                for name in files:
                    _fsync(Path(parent) / name)
                _fsync(Path(parent))
            _fsync_parents(self._folder / prefix, self._folder)


def is_name(name: str) -> bool:
    """Whether a name can be a path segment of a cache."""
    plain = name.isascii() and all(char.isalnum() or char in "._-" for char in name)
    return plain and name[:1].isalnum() and len(name) <= 64


def check_name(kind: str, name: str) -> str:
    """The name, if it can be a path segment of a cache.

    Raises:
        InvalidInput: anything but letters, digits, `.`, `_`, `-`, or a leading dot, or over 64 characters.
    """
    if not isinstance(name, str) or not is_name(name):
        raise InvalidInput(
            f"{kind} name {name!r} cannot be used: take 1 to 64 letters, digits, '.', '_' or '-', "
            "first a letter or digit"
        )
    return name


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turn what a store or the file system raises below zarr into `StoreError`, naming `what`."""
    with _translated(what):
        yield


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise StoreError(f"{what}: {error}; free space or mend access, then run it again") from error


def _put_new(store: Any, path: str, data: bytes) -> bool:
    try:
        obstore.put(store, path, data, mode="create", use_multipart=False)
    except AlreadyExistsError:
        return False
    return True


def _create_file(root: Path, path: Path, data: bytes) -> bool:
    """Exclusive create through a synced temporary file and a hard link, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / TEMPORARY).mkdir(exist_ok=True)
    temporary = root / TEMPORARY / uuid.uuid4().hex
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)
    _fsync_parents(path.parent, root)
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_parents(path: Path, root: Path) -> None:
    while path != root:
        path = path.parent
        _fsync(path)


def _remove_empty_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(parent):
            os.rmdir(parent)
