"""Progress of an ablation for a person: a bar over all steps on a terminal, a line for each run that ends elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from potstill.student_trainer.ablate.outcome import Failure, Outcome
from potstill.student_trainer.ablate.runs import Run
from potstill.student_trainer.metrics.records import MetricsFollower


@dataclass(slots=True)
class Shown:
    """Counts the steps of all runs by following their metrics. Call it now and then."""

    console: Console
    progress: Progress
    task: TaskID
    runs: int
    followers: list[MetricsFollower]
    steps: list[int]
    ended: int = 0

    def __call__(self) -> None:
        """Look at what the runs have written."""
        for index, follower in enumerate(self.followers):
            for record in follower.read():
                self.steps[index] = max(self.steps[index], record["step"])
        self.progress.update(self.task, completed=sum(self.steps), text=f"{self.ended} of {self.runs} runs ended")

    def end(self, found: Outcome | Failure) -> None:
        """Tell of a run that ended."""
        self.ended += 1
        told = f"failed: {found.detail}" if isinstance(found, Failure) else f"{found.seconds:,.0f} s"
        text = f"{self.ended}/{self.runs}  {found.cell}, seed {found.seed}: {told}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self()


@contextmanager
def showing(runs: Sequence[Run], console: Console) -> Iterator[Shown]:
    """Show the progress of runs until the block ends."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps, {task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("ablate", total=sum(run.config.train.steps for run in runs), text="starting")
        followers = [MetricsFollower(run.config.run_dir, after_step=-1) for run in runs]
        yield Shown(console, progress, task, len(runs), followers, [0] * len(runs))
