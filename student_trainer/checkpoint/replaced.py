"""Folders that take the place of others as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potstill.cache.errors import StoreError
from potstill.cache.store.local_files import flush_tree, fsync
from potstill.student_trainer.config.run_folder import PARTIAL


@contextmanager
def replaced(folder: Path, *, mark: str | None = None) -> Iterator[Path]:
    """Give a new folder to write, which replaces `folder` when the block ends; a file `mark` is put into it last.

    Raises:
        StoreError: the disk does not take it.
    """
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        # Before the rename, or a power cut could leave the final name with files that are empty.
        flush_tree(partial, partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        # Not every shared file system renames a folder in one step, so a mark that comes last says that it is whole.
        if mark is not None:
            (folder / mark).touch()
            fsync(folder)
        fsync(folder.parent)
    except OSError as error:
        raise StoreError(f"{str(folder)!r} could not be written: {error}") from error
