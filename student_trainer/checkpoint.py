"""Checkpoints of a run: a folder each, which is complete or counts as not there.

    <run>/checkpoints/step-00000500/
        model/            what `AutoModelForCausalLM.from_pretrained` loads
        optimizer.pt      tensors and plain values, read with weights_only=True: nothing is unpickled
        state.json        step, sample order state, totals
        .complete         written last; a folder without it is not a checkpoint

A checkpoint is written under another name, flushed to disk, renamed, then marked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.cache.corpus import Corpus
from potstill.cache.errors import FormatError, InvalidInput, SpecMismatch, StoreError
from potstill.cache.store.local_files import flush_tree, fsync
from potstill.cache.types import JSON, TeacherIdentity
from potstill.student_trainer.config import LoopConfig
from potstill.student_trainer.corpus_tokenizer import save_tokenizer
from potstill.student_trainer.models import save_student
from potstill.student_trainer.run_folder import PARTIAL

_COMPLETE = ".complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The progress of a run at a checkpoint. The next rows follow from seed, epoch, cursor and corpus."""

    step: int
    """Optimizer steps taken."""
    seed: int
    epoch: int
    """The highest of its corpora."""
    cursor: int
    """Rows drawn since the start of the run."""
    corpus_fingerprint: str
    tokens: int
    """Targets learnt since the start of the run."""
    seconds: float
    """Time spent training, over all sessions."""
    teachers: dict[str, dict[str, JSON]]
    """Identity of each teacher, by name."""
    held: dict[str, str]
    """K and encoding that are read of each teacher's targets, by name."""
    stored_dtype: str = "float32"
    """Dtype of the checkpoint that the student was made of; float32 for random weights."""
    left_out: str = ""
    """sha256 of the rows that are not trained on, in hex; empty for none, and where an earlier version wrote it."""
    prefix_ids: Sequence[int] = ()
    """Token ids that the student sees in front of each row."""

    def check_steps(self, train: LoopConfig) -> None:
        """Check that the run has not taken more steps than it is to have.

        Raises:
            InvalidInput: it has.
        """
        if self.step > train.steps:
            raise InvalidInput(
                f"train.steps is {train.steps}, but the run in {train.out!r} has taken {self.step}; ask for as many or "
                "more, or choose another train.out"
            )

    def check_rows(self, left_out: str, prefix_ids: Sequence[int]) -> None:
        """Check that the run holds out the same rows and sees them with the same prefix as when it began.

        Raises:
            SpecMismatch: it was started by a version that did otherwise.
        """
        if left_out != self.left_out:
            raise SpecMismatch(
                "the run was started with other held-out rows: earlier versions drew rows, now whole documents are "
                "drawn, and some were trained on; go on with that version, or choose another train.out"
            )
        if list(prefix_ids) != list(self.prefix_ids):
            raise SpecMismatch(
                f"the student sees the prefix {list(prefix_ids)}, but the run was started with {list(self.prefix_ids)};"
                " set data.prefix_ids to that, or choose another train.out"
            )

    def check_same(self, fingerprint: str, teachers: Mapping[str, TeacherIdentity], held: Mapping[str, str]) -> None:
        """Check that a run resumes on the corpus and with the teachers it began with.

        Raises:
            SpecMismatch: one of them is another under the same name.
        """
        if fingerprint != self.corpus_fingerprint:
            raise SpecMismatch(
                f"the corpora have the fingerprint {fingerprint[:12]}, but the run was started on "
                f"{self.corpus_fingerprint[:12]}; choose another train.out"
            )
        # Another teacher under the same name would change the loss in the middle of a run, and nobody would see it.
        for name, identity in teachers.items():
            differences = identity.differences(TeacherIdentity.from_json(self.teachers.get(name)))
            if differences:
                raise SpecMismatch(f"teacher {name!r} is not the one the run was started with: {differences}")
            if held[name] != self.held.get(name):
                raise SpecMismatch(
                    f"the targets of teacher {name!r} have {held[name]}, but the run was started with "
                    f"{self.held.get(name)}; choose another train.out"
                )


def save_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: TrainState, *, keep: int
) -> Path:
    """Write a checkpoint below `folder`, then remove all but the newest `keep`; return its folder. For rank 0 only.

    Raises:
        StoreError: the disk does not take it.
    """
    final = folder / f"step-{state.step:08d}"
    with _replaced(final, mark=_COMPLETE) as partial:
        save_student(model, partial / "model")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    # Only now that the new one is safe: a crash at any line leaves at least one complete checkpoint.
    for old in _complete(folder)[:-keep]:
        (old / _COMPLETE).unlink()  # first no longer a checkpoint, then no longer there
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint below `folder`; -1 for none."""
    checkpoint = newest_checkpoint(folder)
    return -1 if checkpoint is None else load_state(checkpoint).step


def load_state(checkpoint: Path) -> TrainState:
    """Read the progress of the run at a checkpoint.

    Raises:
        FormatError: it was written by another version, or is damaged.
    """
    try:
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise FormatError(f"{str(checkpoint / 'state.json')!r} cannot be read: {error}") from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state of the checkpoint; nothing but tensors and plain values is read.

    Raises:
        FormatError: the file holds anything else, or the state of another optimizer.
    """
    file = checkpoint / "optimizer.pt"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error
    except Exception as error:
        # weights_only raises pickle.UnpicklingError; importing pickle to name it would read as if we unpickled.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise FormatError(f"{str(file)!r} holds more than tensors and is not read") from error


def publish_model(folder: Path, model: PreTrainedModel, corpus: Corpus, dtype: str) -> None:
    """Save the final model with the corpus's whole tokenizer at `folder`, in place of one that is there.

    Args:
        folder: where.
        model: the student; its weights are of `dtype` from here on.
        corpus: the one that it was trained on.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        StoreError: the disk does not take it.
    """
    with _replaced(folder) as partial:
        save_student(model.to(getattr(torch, dtype)), partial)
        save_tokenizer(corpus, partial)


@contextmanager
def _replaced(folder: Path, *, mark: str | None = None) -> Iterator[Path]:
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


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*/{_COMPLETE}"))
