"""The progress of a run at a checkpoint, as `state.json` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.cache.errors import FormatError, InvalidInput, SpecMismatch
from potstill.cache.types import JSON, TeacherIdentity
from potstill.student_trainer.train.settings import LoopConfig


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
    lacking: str = ""
    """sha256 of the rows that are skipped for want of targets, in hex; empty where there are none."""
    flagged: str = ""
    """sha256 of the rows that annotations keep out of training, in hex; empty for none."""
    format: int = 1
    """2 where the mark of the checkpoint has hashes; 1 where an earlier version wrote it."""

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

    def check_lacking(self, lacking: str) -> None:
        """Check that the run skips the rows that it skipped when it began, as the order of all others depends on it.

        Raises:
            SpecMismatch: shards were filled or deleted meanwhile.
        """
        if lacking != self.lacking:
            raise SpecMismatch(
                "other shards lack targets than when the run was started, which changes the order of rows; choose "
                "another train.out, and fill the corpus before training where runs are to be resumed"
            )

    def check_flagged(self, flagged: str) -> None:
        """Check that annotations keep the same rows out of training as when the run began.

        Raises:
            SpecMismatch: they keep out others, as the corpus was annotated meanwhile.
        """
        if flagged != self.flagged:
            were = "others" if self.flagged else "none"
            raise SpecMismatch(
                f"annotations keep other rows out of training than when the run was started, when it was {were}: set "
                "data.leave_out to the names of those of that time ([] for none), or choose another train.out"
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


def load_state(checkpoint: Path) -> TrainState:
    """Read the progress of the run at a checkpoint.

    Raises:
        FormatError: it was written by another version, or is damaged.
    """
    try:
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise FormatError(f"{str(checkpoint / 'state.json')!r} cannot be read: {error}") from error
