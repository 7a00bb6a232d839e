"""Folders that take the place of others as a whole, and what is left of those that did not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from potstill.cache.errors import StoreError
from potstill.cache.store.local_files import flush_tree, fsync
from potstill.student_trainer.config.run_folder import PARTIAL


@contextmanager
def replaced(folder: Path, *, mark: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Give a new folder to write, which replaces `folder` when the block ends; then `mark` is called with it.

    Raises:
        StoreError: the disk does not take it; what was written is removed.
    """
    partial = partial_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        take_place(partial, folder, mark)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{str(folder)!r} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has no room to keep it


def partial_of(folder: Path) -> Path:
    """The folder in which what will be `folder` is written."""
    return folder.with_name(f"{PARTIAL}{folder.name}")


def take_place(partial: Path, folder: Path, mark: Callable[[Path], None] | None = None) -> None:
    """Flush a folder that is written, and put it in the place of `folder`; then `mark` is called with it.

    Raises:
        OSError, StoreError: the disk does not take it.
    """
    # Before the rename, or a power cut could leave the final name with files that are empty.
    flush_tree(partial, partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    # Not every shared file system renames a folder in one step, so a mark that comes last says that it is whole.
    if mark is not None:
        mark(folder)
        fsync(folder)
    fsync(folder.parent)


def remove_leftovers(run_dir: Path, is_whole: Callable[[Path], bool]) -> None:
    """Remove what killed writers left in a run's folder and in its `checkpoints`. For whoever has the run's lock.

    Args:
        run_dir: the run's folder.
        is_whole: tells of a folder in `checkpoints` whether to keep it.
    """
    checkpoints = run_dir / "checkpoints"
    left = [path for path in checkpoints.glob("step-*") if path.is_dir() and not is_whole(path)]
    for path in [*left, *run_dir.glob(f"{PARTIAL}*"), *checkpoints.glob(f"{PARTIAL}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
