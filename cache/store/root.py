"""The root of a cache, a local folder or an object store, behind one small class.

Two guarantees are made here and relied on everywhere. `create` puts an object only if there is none, and says who
won. `flush` returns only when everything written before it survives a power cut; object stores promise that on every
put, a local folder has to be told.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

from potstill.cache.errors import InvalidInput
from potstill.cache.store.local_files import (
    TEMPORARY,
    create_file,
    file_versions,
    files_below,
    flush_tree,
    folders_in,
    local_path,
    remove_tree,
)
from potstill.cache.store.object_stores import (
    is_absent,
    is_cut_short,
    open_object_store,
    require_not_forked,
    store_error,
)

# One request of an object store has a minute to answer: small enough for a slow link.
_HASH_BLOCK = 16 << 20
# Beyond obstore's own retries: for a conditional put, an answer that breaks off, and a delete while others delete
# the same objects.
_TRIES = 3

LONGEST_NAME = 64
"""Most characters in the name of a corpus or a teacher."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object below a group: its path relative to the group, its size in bytes, and the sha256 of its content."""

    path: str
    size: int
    sha256: str


class Root:
    """The root of a cache. Paths are relative to it and use `/`. Thread-safe.

    In a local root no symbolic link is followed: a method that is given a path through one, or finds one in what it is
    to list with sizes, raises CorruptSegment.
    """

    def __init__(self, url: str, store: Any, folder: Path | None) -> None:
        self.url = url
        self._store = store
        self.folder = folder
        """The local folder; None for an object store."""
        self._clock_began: float | None = None
        self._made = False

    @classmethod
    def open(cls, url: str | Path, *, create: bool = False) -> Self:
        """Open a root by path or URL, with `create` for writing too; an object store is reached once.

        Raises:
            InvalidInput: the local folder does not exist, without `create`; the path is a file; the URL scheme is
                unknown; the object store has no conditional puts.
            StoreError: the folder cannot be made; the bucket is missing, denied or not reached in about 20 seconds.
        """
        text = str(url)
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise InvalidInput(f"cannot open {text!r}: {error}") from error
        if "://" in text and parts.scheme != "file":
            return cls(text, open_object_store(text, write=create), None)
        if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path):
            raise InvalidInput(f"{text!r} names no folder; write file:///absolute/path, or the path alone")
        folder = Path(unquote(parts.path) if parts.scheme == "file" else text).expanduser().absolute()
        with store_errors(text):
            if folder.exists() and not folder.is_dir():
                raise InvalidInput(f"no cache at {text!r}: it is a file, not a folder")
            made = create and not folder.exists()
            if create:
                folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise InvalidInput(f"no cache at {text!r}: the folder does not exist; `potstill ingest` makes one")
        root = cls(text, folder, folder)
        root._made = made
        return root

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address, which is opened again.

        Raises:
            InvalidInput: what is stored lives in this process only.
        """
        if self.url.startswith("memory:"):
            raise InvalidInput(f"{self.url} lives in the memory of its process and cannot be opened in another one")
        return type(self).open, (self.folder or self.url,)

    @property
    def store(self) -> Any:
        """The folder, or the obstore store; zarr wraps either.

        Raises:
            InvalidInput: an object store, in a forked child of the process that used one first.
        """
        if self.folder is None:
            require_not_forked(self.url)
        return self._store

    def get(self, path: str) -> bytes | None:
        """Read an object; None when there is none."""
        with self._access(path):
            try:
                if self.folder is not None:
                    with open(f"{self.folder}/{path}", "rb") as file:
                        return file.read()
                return _whole(lambda: bytes(obstore.get(self.store, path).bytes()))
            except FileNotFoundError as error:
                if is_absent(error):
                    return None
                raise

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        """Put an object only if there is none. True when the object that is there now has these bytes.

        That is also so when an earlier try put it and only the answer was lost. When this raises, the object may
        exist all the same, so what it names must not be deleted. Without `durable`, a local folder may lose the
        object in a power cut.
        """
        with self._access(path):
            if self.folder is not None:
                created = create_file(self.folder, self.folder / path, data, durable=durable)
            else:
                created = self._put_new(path, data)
        return created or self.get(path) == data

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of every object below `prefix`, by its path relative to `prefix`."""
        return {path: size for path, (size, _) in self._objects_below(prefix).items()}

    def seconds_since_write(self, prefix: str) -> float | None:
        """Seconds since the last write of any object below `prefix`, by the store's clock; None when there is none."""
        return min(self.ages(prefix).values(), default=None)

    def ages(self, prefix: str) -> dict[str, float]:
        """Seconds since each object below `prefix` was written, by the store's clock; keys are relative paths."""
        below = self._objects_below(prefix)
        now = self.now() if below else 0.0
        return {path: now - written for path, (_, written) in below.items()}

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, which also dates its objects; this machine's may be wrong.

        Raises:
            StoreError: the store does not answer or cannot be written.
        """
        if self.folder is not None:
            # A file system that many machines share has a clock of its own. One that cannot be written has no writer.
            with suppress(OSError), tempfile.TemporaryFile(dir=self.folder) as file:
                return os.fstat(file.fileno()).st_mtime
            return time.time()
        if self._clock_began is None:
            path = f"{TEMPORARY}/{uuid.uuid4().hex}"
            with self._access(path):
                obstore.put(self.store, path, b"", use_multipart=False)
                written = obstore.head(self.store, path)["last_modified"].timestamp()
            self.remove(path)
            self._clock_began = written - time.monotonic()
        return self._clock_began + time.monotonic()

    def folders(self, prefix: str, *, longest: int = LONGEST_NAME) -> list[str]:
        """Names of the folders directly below `prefix`, sorted; those that `is_name` refuses are left out."""
        with self._access(prefix):
            if self.folder is not None:
                names = folders_in(self.folder / prefix)
            else:
                listing = _whole(lambda: obstore.list_with_delimiter(self.store, prefix))
                names = [path.rstrip("/").rsplit("/", 1)[-1] for path in listing["common_prefixes"]]
        return sorted(name for name in names if is_name(name, longest=longest))

    def objects(self, prefix: str) -> list[str]:
        """Names of the objects directly below `prefix`, sorted; hidden ones are left out."""
        return sorted(self.versions(prefix))

    def versions(self, prefix: str) -> dict[str, str]:
        """Objects directly below `prefix`: by name, a version text that changes when the object is replaced."""
        with self._access(prefix):
            if self.folder is not None:
                return dict(file_versions(self.folder / prefix))
            listing = _whole(lambda: obstore.list_with_delimiter(self.store, prefix))
        found = ((meta["path"].rsplit("/", 1)[-1], meta) for meta in listing["objects"])
        return {
            name: f"{meta['e_tag']} {meta['last_modified'].timestamp()} {meta['size']}"
            for name, meta in found
            if not name.startswith(".")
        }

    def sha256(self, path: str) -> str:
        """Hash of an object's bytes, in hex; read in blocks, so that a large object is never held whole."""
        digest = hashlib.sha256()
        with self._access(path):
            if self.folder is not None:
                with open(f"{self.folder}/{path}", "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            size = int(obstore.head(self.store, path)["size"])
            for start in range(0, size, _HASH_BLOCK):
                digest.update(obstore.get_range(self.store, path, start=start, end=min(start + _HASH_BLOCK, size)))
        return digest.hexdigest()

    def put(self, path: str, data: bytes) -> None:
        """Put an object under a name that nobody else uses and nothing refers to yet; what is there is replaced."""
        with self._access(path):
            if self.folder is not None:
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / path).write_bytes(data)
                return
            obstore.put(self.store, path, data)

    def put_file(self, path: str, file: Path) -> None:
        """Put a file's bytes, of any number, under a name that nothing refers to; what is there is replaced."""
        with self._access(path):
            if self.folder is not None:
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.folder / path)
                return
            obstore.put(self.store, path, file)

    def get_file(self, path: str, file: Path) -> None:
        """Write an object's bytes into a file, in blocks.

        Raises:
            StoreError: there is no such object, or it cannot be read; what is in the file is of no use.
        """
        with self._access(path), file.open("wb") as out:
            if self.folder is not None:
                with (self.folder / path).open("rb") as found:
                    shutil.copyfileobj(found, out)
                return
            size = int(obstore.head(self.store, path)["size"])
            for start in range(0, size, _HASH_BLOCK):
                ask = partial(obstore.get_range, self.store, path, start=start, end=min(start + _HASH_BLOCK, size))
                out.write(_whole(ask))

    def remove(self, path: str) -> None:
        """Remove one object if it is there."""
        with self._access(path), suppress(FileNotFoundError):
            if self.folder is not None:
                (self.folder / path).unlink()
                return
            _whole(lambda: obstore.delete(self.store, path))

    def delete(self, prefix: str) -> None:
        """Remove every object below `prefix`, and in a local root the folders that this leaves empty."""
        with self._access(prefix):
            if self.folder is not None:
                remove_tree(self.folder / prefix)
                return
            for tries_left in reversed(range(_TRIES)):
                paths = [f"{prefix}/{path}" for path in self.sizes(prefix)]
                try:
                    obstore.delete(self.store, paths)
                except (BaseError, FileNotFoundError):
                    # Some stores refuse to delete what another process deleted a moment ago.
                    if not tries_left:
                        raise
                else:
                    return

    def prune(self, prefix: str) -> None:
        """Remove a folder of a local root if it is empty, then the folders above that became empty by it."""
        if self.folder is not None:
            self.refuse_link(prefix)
            folder = self.folder / prefix
            # The first that is not empty, or gone, ends it.
            with suppress(OSError):
                while folder != self.folder:
                    folder.rmdir()
                    folder = folder.parent

    def remove_if_unused(self) -> None:
        """Remove the folder of a local root that opening it made, as long as nothing is in it."""
        if self._made and self.folder is not None:
            with suppress(OSError):
                self.folder.rmdir()

    def flush(self, prefix: str) -> None:
        """Return when everything below `prefix` is on stable storage."""
        if self.folder is None:
            return
        with self._access(prefix):
            flush_tree(self.folder / prefix, self.folder)

    def refuse_link(self, path: str) -> None:
        """Refuse a path that leads through a symbolic link below a local root.

        Raises:
            CorruptSegment: it does.
        """
        if self.folder is not None:
            local_path(self.folder, path)

    def _access(self, path: str) -> Any:
        """The block in which every request for `path` is made."""
        self.refuse_link(path)
        return store_errors(path if self.folder is not None else f"{self.url.rstrip('/')}/{path}")

    def _objects_below(self, prefix: str) -> dict[str, tuple[int, float]]:
        """Size in bytes and time of the last write, in seconds since 1970, by path relative to `prefix`."""
        with self._access(prefix):
            if self.folder is not None:
                return dict(files_below(self.folder, self.folder / prefix))
            metas = _whole(lambda: obstore.list(self.store, prefix).collect())
            return {
                meta["path"][len(prefix) + 1 :]: (int(meta["size"]), meta["last_modified"].timestamp())
                for meta in metas
            }

    def _put_new(self, path: str, data: bytes) -> bool:
        for tries_left in reversed(range(_TRIES)):
            try:
                obstore.put(self.store, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            except (PermissionDeniedError, UnauthenticatedError, FileNotFoundError):
                raise
            except BaseError:
                # The request may have been carried out and only its answer lost.
                if self.get(path) is not None:
                    return False
                if not tries_left:
                    raise
            else:
                return True
        raise AssertionError("the last try returns or raises")


def is_name(name: str, *, longest: int = LONGEST_NAME) -> bool:
    """Tell whether a name can be a path segment of a cache."""
    plain = name.isascii() and all(char.isalnum() or char in "._-" for char in name)
    return plain and name[:1].isalnum() and len(name) <= longest


def check_name(kind: str, name: str) -> str:
    """Return the name if it can be a path segment of a cache; `kind` says in the error what it names.

    Raises:
        InvalidInput: it has other characters than letters, digits, `.`, `_`, `-`, a leading dot, or more than 64.
    """
    if not isinstance(name, str) or not is_name(name):
        raise InvalidInput(
            f"{kind} name {name!r} cannot be used: take 1 to {LONGEST_NAME} letters, digits, '.', '_' or '-', "
            "first a letter or digit"
        )
    return name


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turn errors of the store or the file system, also from below zarr, into `StoreError` with `what` in front."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise store_error(what, error) from error


def _whole(ask: Callable[[], _T]) -> _T:
    """Ask for an answer, again when it breaks off midway."""
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except BaseError as error:
            if not is_cut_short(error):
                raise
    return ask()
