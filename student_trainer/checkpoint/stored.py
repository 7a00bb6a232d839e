"""Runs in object stores: what is complete in the folder here is put there, and brought back where a run goes on.

    <url>/checkpoints/step-00000500/
        checkpoint/...    the files of the checkpoint
        run/...           config.json, metrics.jsonl and others beside them, as they were
        stored.json       put last, with the size and sha256 of the others; without it nothing there is read
    <url>/results/step-00001000/
        run/...           these, summary.json and model/
        stored.json

The store counts, and the folder is a copy: what it has and the store has not is not gone on from.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from potstill.cache.errors import CorruptSegment, StoreError, StoreSilent
from potstill.cache.store import Root
from potstill.student_trainer.checkpoint.marker import hashes_of, measured
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import PARTIAL, only_trainer, write_lines

_LOG = logging.getLogger(__name__)
_STORED = "stored.json"
_RECORDS = ("config.json", "metrics.jsonl", "skipped.json", "trackers.json")
_RESULT = (*_RECORDS, "summary.json", "model")

Kind = Literal["checkpoints", "results"]


class StoredRun:
    """A run in a store, and the folder here that it is put from and brought to."""

    def __init__(self, root: Root, folder: Path) -> None:
        self._root, self._folder = root, folder

    @classmethod
    def open(cls, url: str, folder: Path, *, write: bool) -> Self:
        """Reach the store.

        Raises:
            InvalidInput: it can hold no run, or its scheme is unknown. StoreError: it does not answer.
        """
        return cls(Root.open(url, create=write), folder)

    def put_checkpoint(self, checkpoint: Path) -> None:
        """Put a complete checkpoint; then earlier ones that are no longer in the folder here are removed there.

        Raises:
            StoreError: the store does not take it; the older ones stay.
        """
        with _lasting():
            self._put("checkpoints", checkpoint.name, {"checkpoint": checkpoint, **self._records(_RECORDS)})
            kept = {path.name for path in checkpoint.parent.glob("step-*")}
            # Those of later steps may be another machine's, which went on while this one was thought to be gone.
            there = self._root.folders("checkpoints")
            self._remove("checkpoints", [name for name in there if name not in kept and name < checkpoint.name])

    def put_result(self, step: int) -> None:
        """Put the result and the model of a finished run, and remove those of earlier steps.

        Raises:
            StoreError: the store does not take it.
        """
        name = f"step-{step:08d}"
        with _lasting():
            self._put("results", name, self._records(_RESULT))
            self._remove("results", [other for other in self._root.folders("results") if other != name])

    def bring(self) -> int:
        """Bring the newest checkpoint that is what was put, and the result if there is none of an earlier step.

        Damaged ones are passed over, with a warning.

        Returns:
            The step of the checkpoint, where its hashes are those that its own mark has; else -1.

        Raises:
            CorruptSegment: there are checkpoints, and all are damaged. StoreError: the store does not answer.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoint = self._bring_newest("checkpoints", "")
        result = self._bring_newest("results", checkpoint)
        if not result:
            (self._folder / "summary.json").unlink(missing_ok=True)
        step = checkpoint.removeprefix("step-")
        return int(step) if step.isdecimal() and self._is_marked(checkpoint) else -1

    def _is_marked(self, name: str) -> bool:
        """Tell whether a checkpoint's own mark names the hashes that the store has, with which it was compared."""
        mark = hashes_of(self._folder / "checkpoints" / name)
        files: dict[str, Any] = json.loads((self._folder / ".stored-checkpoints").read_bytes())["files"]
        return bool(mark) and all(files.get(f"checkpoint/{each}") == hashed for each, hashed in mark.items())

    def _records(self, names: tuple[str, ...]) -> dict[str, Path]:
        # The run may go on meanwhile and write further lines.
        as_now = self._folder / f"{PARTIAL}metrics.jsonl"
        shutil.copyfile(self._folder / "metrics.jsonl", as_now)
        return {f"run/{name}": as_now if name == "metrics.jsonl" else self._folder / name for name in names}

    def _put(self, kind: Kind, name: str, parts: Mapping[str, Path]) -> None:
        group = f"{kind}/{name}"
        self._remove(kind, [name])  # what a killed writer left, or one that was damaged
        files = {each: file for begin, path in parts.items() for each, file in _files(begin, path)}
        told = json.dumps({"name": name, "files": {each: measured(file) for each, file in files.items()}}, indent=1)
        for each, file in files.items():
            self._root.put_file(f"{group}/{each}", file)
        if not self._root.create(f"{group}/{_STORED}", told.encode()):
            raise StoreError(f"{self._root.url}/{group} is written by another run; choose another train.out")
        self._note(kind, told)

    def _remove(self, kind: Kind, names: list[str]) -> None:
        for name in names:
            self._root.remove(f"{kind}/{name}/{_STORED}")  # first not to be read, then gone
            self._root.delete(f"{kind}/{name}")

    def _bring_newest(self, kind: Kind, at_least: str) -> str:
        """Bring the newest whole group of a kind, and return its name; empty where there is none."""
        told = ""
        for name in reversed([each for each in self._root.folders(kind) if each >= at_least]):
            mark = self._root.get(f"{kind}/{name}/{_STORED}")
            if mark is None:
                continue
            problem = "" if self._has(kind, name, mark) else self._bring(kind, name, mark)
            if not problem:
                if told:
                    _LOG.warning("%s; the newest good one is %s", told, name)
                return name
            told += f"{told and '; '}{self._root.url}/{kind}/{name} is damaged: {problem}"
        if told and kind == "checkpoints":
            raise CorruptSegment(f"{told}; none is left to go on from: put one back, or choose another train.out")
        if told:
            _LOG.warning(told)
        return ""

    def _bring(self, kind: Kind, name: str, mark: bytes) -> str:
        """Bring a group; say what is wrong with it, and then leave all as it was."""
        partial = self._folder / f"{PARTIAL}{kind}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            files: dict[str, Any] = json.loads(mark)["files"]
            there = self._root.sizes(f"{kind}/{name}")
            for each, expected in files.items():
                if there.get(each) != expected["bytes"]:
                    return f"{each} is missing or of another size"
                file = partial.joinpath(*each.split("/"))
                if not file.is_relative_to(partial) or ".." in file.parts:
                    return f"{each!r} is no name of a file"
                file.parent.mkdir(parents=True, exist_ok=True)
                self._root.get_file(f"{kind}/{name}/{each}", file)
                if measured(file) != expected:
                    return f"{each} has other bytes than were put"
            self._take(partial, name if kind == "checkpoints" else "")
            self._note(kind, mark.decode())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{_STORED} cannot be read: {error!r}"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return ""

    def _take(self, partial: Path, checkpoint: str) -> None:
        """Put what was brought in the place of what is here; of a checkpoint, of all others."""
        for name in _RECORDS:
            (self._folder / name).unlink(missing_ok=True)
        for found in (partial / "run").iterdir():
            _move(found, self._folder / found.name)
        if checkpoint:
            checkpoints = self._folder / "checkpoints"
            shutil.rmtree(checkpoints, ignore_errors=True)
            checkpoints.mkdir()
            (partial / "checkpoint").rename(checkpoints / checkpoint)

    def _note(self, kind: Kind, mark: str) -> None:
        """Keep which group of a kind the folder here has."""
        write_lines(self._folder / f".stored-{kind}", [mark])

    def _has(self, kind: Kind, name: str, mark: bytes) -> bool:
        """Tell whether the folder here has a group of the store whole, as that was put from here or brought before."""
        file = self._folder / f".stored-{kind}"
        if not file.exists() or file.read_bytes() != mark + b"\n":
            return False
        if kind == "results" and not (self._folder / "summary.json").exists():
            return False  # the run went on
        # Records may have more lines here.
        begin, folder = ("checkpoint/", f"checkpoints/{name}") if kind == "checkpoints" else ("run/model/", "model")
        files: dict[str, Any] = json.loads(mark)["files"]
        copies = {each: self._folder / folder / each.removeprefix(begin) for each in files if each.startswith(begin)}
        return all(copy.is_file() and measured(copy) == files[each] for each, copy in copies.items())


@contextmanager
def _lasting() -> Iterator[None]:
    """Make a store that does not answer an error that ends the run: nobody waits for it here.

    As one that may be waited for it would pass for a read of rows, after which a run says that its checkpoint was
    written, and this worker would leave the others waiting.
    """
    try:
        yield
    except StoreSilent as error:
        raise StoreError(error.detail) from error


def stored_run(config: TrainConfig) -> StoredRun | None:
    """Reach the store of the run at `train.out`; None where that is a folder. Raises as `StoredRun.open`."""
    return StoredRun.open(config.train.out, config.run_dir, write=True) if config.in_store else None


def bring_run(config: TrainConfig) -> int:
    """Bring the run at `train.out` to its folder here, if it is in an object store; call it before all else.

    Returns:
        The step of a checkpoint that was compared with its hashes and need not be again; -1 for none.

    Raises:
        Unavailable: another process here trains it. PotstillError: as `StoredRun`.
    """
    stored = stored_run(config)
    if stored is None:
        return -1
    with only_trainer(config.run_dir):
        return stored.bring()


def _files(begin: str, path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield begin, path
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield f"{begin}/{file.relative_to(path).as_posix()}", file


def _move(found: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    found.replace(place)
