"""The files of a run's folder that say what it is; nothing here needs torch.

Files are written under another name, flushed and renamed, so that a reader sees the old one or the new one.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from potstill.cache.errors import FormatError, InvalidInput, NotFound, StoreError, Unavailable
from potstill.cache.store.local_files import fsync
from potstill.student_trainer.config import TrainConfig

_LOCK_SECONDS = 5.0
"""Workers that Ray replaces may take so many seconds to be gone."""
PARTIAL = ".partial-"
"""Begins the name of a file or folder that is still being written."""


def read_config(run_dir: Path, cache: str | None = None) -> TrainConfig:
    """Read the config that a run was started with; its `train.out` is the folder where it lies now.

    `cache` is where its cache is now, if it is not where it was.

    Raises:
        NotFound: no run there. FormatError: not a config of this version.
    """
    file = run_dir / "config.json"
    if not file.exists():
        raise NotFound(f"no run in {str(run_dir)!r}: there is no config.json")
    try:
        config = TrainConfig.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error
    except InvalidInput as error:
        raise FormatError(f"{str(file)!r} is not the config of a run of `potstill train`: {error}") from error
    train = config.train.model_copy(update={"out": str(run_dir.absolute())})
    data = config.data if cache is None else config.data.model_copy(update={"cache": cache})
    return config.model_copy(update={"train": train, "data": data})


def write_json(file: Path, value: object) -> None:
    """Replace a JSON file as a whole: a reader sees the old one or the new one.

    Raises:
        StoreError: the disk does not take it.
    """
    write_lines(file, [json.dumps(value, indent=1)])


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """Replace a text file as a whole.

    Raises:
        StoreError: the disk does not take it.
    """
    partial = file.with_name(f"{PARTIAL}{file.name}")
    try:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        fsync(partial)  # or a power cut could leave the name with an empty file
        partial.replace(file)
    except OSError as error:
        raise StoreError(f"{str(file)!r} could not be written: {error}") from error


@contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in the run's folder; the lock of a killed one is gone with it.

    Raises:
        Unavailable: another process trains there, and still does after some seconds.
        StoreError: the folder cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"train.out {str(run_dir)!r} cannot be made: {error}") from error
    with (run_dir / ".lock").open("w") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"another process is training in {str(run_dir)!r}; wait for it, or stop it"
                    ) from error
                time.sleep(0.1)
        yield
