"""The tasks of an ablation: every student is asked the same questions, so that answers are paired by question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.cache.errors import InvalidInput, SpecMismatch
from potstill.student_trainer.ablate.measures import TASK
from potstill.student_trainer.ablate.outcome import PerDocument


@dataclass(frozen=True, slots=True)
class Asked:
    """Tasks as they were when an ablation was called."""

    tasks: str
    """A folder's absolute path, or names of the harness's own."""
    fingerprint: str
    """A hash of their questions."""


def asked_of(tasks: str, tokenizer: PreTrainedTokenizerBase, corpus: str) -> Asked:
    """Open tasks, and check that students with the tokenizer of a corpus can be asked and compared by them.

    Raises:
        InvalidInput: they cannot be opened, no metric of them is a mean over questions, or the tokenizer has no special
            tokens.
    """
    # The harness is an extra of its own, and takes seconds to import.
    from potstill.student_trainer.evaluate.tasks.harness import check_tokenizer, open_tasks  # noqa: PLC0415

    check_tokenizer(tokenizer, corpus)
    folder = Path(tasks)
    asked = str(folder.absolute()) if folder.is_dir() else tasks
    with open_tasks(asked) as opened:
        if not any(opened.means().values()):
            raise InvalidInput(
                f"tasks {tasks!r} have no metric that is a mean over questions, as acc is, so that no student could be "
                "compared with another question by question; give others"
            )
        return Asked(asked, opened.fingerprint())


def answers(
    asked: Asked, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, PerDocument], list[str]]:
    """Measure a student by tasks: the value of each question, of all metrics that are means over questions.

    Returns:
        The measures by name, and what there is to say of them.

    Raises:
        SpecMismatch: the questions are others than before.
        InvalidInput: tasks cannot be opened or run.
    """
    from potstill.student_trainer.evaluate.tasks.harness import open_tasks, run_tasks  # noqa: PLC0415

    with open_tasks(asked.tasks) as opened:
        if opened.fingerprint() != asked.fingerprint:
            raise SpecMismatch(
                f"tasks {asked.tasks!r} were changed meanwhile; the same command judges by them as they are"
            )
        found = run_tasks(opened, model, tokenizer, of_questions=True)
    measures, notes = {}, list(found.notes)
    for name, task in found.tasks.items():
        for metric, score in task.scores.items():
            values = task.of_questions.get(metric)
            if values is not None:
                measures[f"{TASK}{name} {metric}"] = PerDocument([1.0] * len(values), values, score.higher_is_better)
            elif task.questions is not None:  # else it is a group, whose tasks are compared
                notes.append(f"{metric} of task {name!r} is no mean over questions, and is not compared")
    return measures, notes
