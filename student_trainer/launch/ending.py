"""The last lines of a command that trains."""

from __future__ import annotations

from potstill.cache.plurals import counted
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.result import TrainResult
from potstill.student_trainer.metrics.progress import evaluations_text


def tell_end(result: TrainResult, config: TrainConfig) -> None:
    """Print what came of a run: its numbers and its model, or where it was stopped."""
    if not result.finished:
        print(f"stopped at step {result.step} of {config.train.steps}; the same command goes on from there")  # noqa: T201 -- a command
        return
    lines = [f"trained on {counted(result.tokens, 'token')} in {result.seconds:,.0f} s"]
    if result.rollbacks:
        spikes = counted(result.rollbacks, "loss spike")
        lines.append(f"went back from {spikes}; the rows that were left out are in {result.run_dir / 'skipped.json'}")
    if told := evaluations_text(result.to_json()):
        lines.append(told.strip())
    lines.append(f"model: {result.run_dir / 'model'}")
    if config.in_store:
        lines.append(f"run: {config.train.out}, of which the folder here is a copy")
    print("\n".join(lines))  # noqa: T201 -- a command
