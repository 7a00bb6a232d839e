"""Files of a local root: created once, listed, flushed, removed; no symbolic link below the root is followed.

A link that somebody put into a cache could lead what is read, or deleted as garbage, to files that are none of its own.
The root itself may be reached through links.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from potstill.cache.errors import CorruptSegment

TEMPORARY = ".potstill-tmp"
"""Folder of a local root in which a record is completed before it appears under its name."""
# Seconds for which a create is tried again while other processes keep removing its empty folder.
_LINK_SECONDS = 10.0


def local_path(root: Path, path: str) -> str:
    """The place of `path` below the root.

    Raises:
        CorruptSegment: a name on the way is a symbolic link.
    """
    # Text, here and below: a path object for each name would take most of the time.
    found = str(root)
    for name in filter(None, path.split("/")):
        found = f"{found}/{name}"
        if os.path.islink(found):
            raise _refusal(root, Path(found))
    return found


def _refusal(root: Path, link: Path) -> CorruptSegment:
    return CorruptSegment(
        f"{link.relative_to(root).as_posix()} is a symbolic link, and none is followed in a cache; "
        "remove it, or put what it leads to in its place"
    )


def create_file(root: Path, path: Path, data: bytes, *, durable: bool) -> bool:
    """Create a file only if there is none, by a hard link to a complete temporary file: no reader sees half of it."""
    folder = Path(local_path(root, TEMPORARY))
    folder.mkdir(exist_ok=True)
    temporary = folder / uuid.uuid4().hex
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        try:
            _link(temporary, path)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    # After the link: until its folder is on disk too, a power cut can undo a create that the caller was told of.
    if durable:
        fsync(path.parent)
        fsync_parents(path.parent, root)
    return True


def _link(temporary: Path, path: Path) -> None:
    deadline = time.monotonic() + _LINK_SECONDS
    while time.monotonic() < deadline and temporary.exists():
        # Another process may find the folder empty, and remove it, right before.
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(temporary, path)
            return
    os.link(temporary, path)


def files_below(root: Path, folder: Path) -> Iterator[tuple[str, tuple[int, float]]]:
    """Every file with its size and time of last write; also what an interrupted put left, which obstore hides.

    Raises:
        CorruptSegment: there is a symbolic link.
    """
    folders = [""]
    while folders:
        below = folders.pop()
        for entry in _entries(f"{folder}/{below}"):
            # Others may be removing the same.
            with suppress(FileNotFoundError):
                if entry.is_symlink():
                    raise _refusal(root, Path(entry.path))
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{below}{entry.name}/")
                else:
                    found = entry.stat(follow_symlinks=False)
                    yield below + entry.name, (found.st_size, found.st_mtime)


def folders_in(folder: Path) -> list[str]:
    """Names of the folders directly in a folder; none when there is no such folder."""
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def file_versions(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of the files directly in a folder, each with a text that changes when it is replaced; no hidden ones."""
    for entry in _entries(folder):
        # Others may be removing the same.
        with suppress(FileNotFoundError):
            if not entry.name.startswith(".") and entry.is_file():
                found = entry.stat()
                yield entry.name, f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"


def flush_tree(folder: Path, root: Path) -> None:
    """Return when everything in a folder below `root` is on the disk, under its name."""
    # The folders too: on a local file system a file's own fsync does not keep its name.
    for parent, _, files in os.walk(folder):
        for name in files:
            fsync(Path(parent) / name)
        fsync(Path(parent))
    fsync_parents(folder, root)


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return list(entries)
    return []


def fsync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_parents(path: Path, root: Path) -> None:
    """Return when the names of all folders from the root down to `path` are on stable storage."""
    while path != root:
        path = path.parent
        fsync(path)


def remove_tree(folder: Path) -> None:
    """Remove files, then the folders that are empty by then; other processes may be removing the same."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            (Path(parent) / name).unlink(missing_ok=True)
        # A folder that is not empty, or already gone, is left to whoever uses it.
        with suppress(OSError):
            os.rmdir(parent)
