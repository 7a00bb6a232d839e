"""The runs of an ablation: every cell with every seed, checked before the first starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from potstill.cache.errors import InvalidInput, PotstillError, SpecMismatch
from potstill.cache.named_files import read_toml
from potstill.cache.plurals import counted
from potstill.student_trainer.ablate.asked import Asked, asked_of
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.intervals import FEWEST_DOCUMENTS
from potstill.student_trainer.ablate.judge import judge
from potstill.student_trainer.ablate.outcome import Failure, Outcome, Point, load_outcome, run_folder
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.resume import check_continues
from potstill.student_trainer.config.run_folder import read_config
from potstill.student_trainer.data.held_out import num_documents
from potstill.student_trainer.metrics.records import Record, read_metrics
from potstill.student_trainer.models.architecture import student_settings
from potstill.student_trainer.models.build import check_student
from potstill.student_trainer.models.corpus_tokenizer import model_tokenizer
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import OpenRun, open_run

_LOG = logging.getLogger(__name__)
_SAME_FOR_ALL = ("save_dtype", "rollback_over", "rollback_window")
"""Keys of `train` that change what comes of a run, though one may go on under others."""


@dataclass(frozen=True, slots=True)
class Run:
    """One cell with one seed."""

    cell: str
    seed: int
    config: TrainConfig
    base: TrainConfig
    """The run that cells change, with whose teachers and held-out rows all are judged."""
    asked: Asked | None
    """Tasks that all are judged by."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tasks' questions; empty where there are none."""
        return "" if self.asked is None else self.asked.fingerprint


def plan_runs(grid: GridConfig) -> list[Run]:
    """Make the runs, all cells of a seed after each other, and check that each can start.

    Raises:
        InvalidInput: naming every cell that cannot, or the file of the run that they change, or what is wrong of tasks.
    """
    table, out = read_toml(grid.config), Path(grid.out).absolute()
    table["train"] = {**table.get("train", {}), "out": str(out / "runs")}
    base = TrainConfig.of(table).absolute()
    runs: list[Run] = []
    problems = []
    with open_run(base) as opened:
        if not len(opened.held_out):
            raise InvalidInput(f"data.held_out of {grid.config!r} is 0, so that there is nothing to compare cells by")
        documents = num_documents(opened.corpora.document_rows, opened.held_out)
        if documents < FEWEST_DOCUMENTS:
            _LOG.warning(
                "%s held out: below %d no interval over documents is given, so no difference can be more than noise; "
                "raise data.held_out of %r",
                counted(documents, "document"),
                FEWEST_DOCUMENTS,
                grid.config,
            )
        for cell in grid.all_cells:
            try:
                configs = [cell.config(table, seed, str(run_folder(out, cell.name, seed))) for seed in grid.seeds]
                _check(configs[0], opened)
            except PotstillError as error:
                problems.append(f"{cell.name}: {error.detail}")
            else:
                of_cell = zip(grid.seeds, configs, strict=True)
                runs.extend(Run(cell.name, seed, config.absolute(), base, None) for seed, config in of_cell)
        if problems:
            raise InvalidInput(f"{len(problems)} of {len(grid.all_cells)} cells cannot run: {'; '.join(problems)}")
        asked = _asked(grid, base, opened)
    return [replace(run, asked=asked) for run in sorted(runs, key=lambda run: grid.seeds.index(run.seed))]


def _asked(grid: GridConfig, base: TrainConfig, opened: OpenRun) -> Asked | None:
    if not grid.tasks:
        return None
    settings = student_settings(base.student, opened.vocab_size)
    return asked_of(grid.tasks, model_tokenizer(settings, opened.corpus), opened.corpus.name)


def _check(config: TrainConfig, base: OpenRun) -> None:
    """Check what one run needs, as far as it can be told without training."""
    if config.train.workers_range[0] > 1:
        raise InvalidInput(f"train.workers is {config.train.workers}, but runs of an ablation have one worker each")
    with open_run(config) as opened:
        if opened.left_out != base.left_out:
            raise InvalidInput(
                "it holds out other rows than the run that it changes; leave those of [data] as they are"
            )
        if opened.lacking != base.lacking:
            raise InvalidInput(
                "it skips other rows for want of targets than the run that it changes; run `potstill prefill` for them"
            )
        if opened.reader.prefix != base.reader.prefix:
            ours, theirs = (list(each.reader.prefix) for each in (opened, base))
            raise InvalidInput(
                f"its student sees {ours} in front of each row, but is judged with {theirs}; set data.prefix_ids of "
                "the run to what all cells are to see"
            )
        check_student(config.student, vocab_size=opened.vocab_size, row_tokens=opened.row_tokens)


def outcomes_there(runs: Sequence[Run], out: Path) -> dict[tuple[str, int], Outcome]:
    """Read the outcomes of earlier calls, by cell and seed, but for those of students that were asked other questions.

    Raises:
        SpecMismatch: one is of a run under other settings, which are named.
    """
    found = {}
    for run in runs:
        outcome = load_outcome(out, run.cell, run.seed)
        try:
            before = _before(run, outcome)
        except SpecMismatch as error:
            raise SpecMismatch(
                f"cell {run.cell!r} was begun otherwise: {error.detail}; or give the changed cell another name"
            ) from error
        if outcome is None or before is None or outcome.asked != run.fingerprint:
            continue
        if before.train.steps == run.config.train.steps:
            found[run.cell, run.seed] = outcome
    return found


def _before(run: Run, outcome: Outcome | None) -> TrainConfig | None:
    """Find the config under which a run was begun, and check that it compares with what is to come."""
    if outcome is None:
        begun = (run.config.run_dir / "config.json").exists()
        before = read_config(run.config.run_dir) if begun else None
    else:
        before = TrainConfig.of(outcome.config)
        check_continues(run.base, TrainConfig.of(outcome.base))
    if before is not None:
        _check_same(run.config, before)
    return before


def _check_same(config: TrainConfig, before: TrainConfig) -> None:
    """Check that what comes of a run compares with what came of others, of which some may have begun only now.

    Raises:
        SpecMismatch: a key differs that a run alone may change when it goes on.
    """
    check_continues(config, before)
    now, then = ({name: getattr(each.train, name) for name in _SAME_FOR_ALL} for each in (config, before))
    if config.train.schedule != "constant":
        for each, loop in ((now, config.train), (then, before.train)):
            each["schedule_steps"] = loop.schedule_steps or loop.steps
    name = next((name for name in now if now[name] != then[name]), None)
    if name is not None:
        raise SpecMismatch(
            f"train.{name} is {now[name]!r}, but it was {then[name]!r} when the run in {config.train.out!r} was "
            "started, and cells would no longer compare; change it back, or choose another out"
        )


def run_here(
    run: Run, out: Path, should_stop: Callable[[], bool], on_record: Callable[[Record], None]
) -> Outcome | Failure | None:
    """Do as `train_and_judge`, but return an error as what became of the run."""
    try:
        return train_and_judge(run, out, should_stop, on_record)
    except PotstillError as error:
        return Failure(run.cell, run.seed, f"{error.kind}: {error.detail}")


def train_and_judge(
    run: Run, out: Path, should_stop: Callable[[], bool], on_record: Callable[[Record], None] = lambda _: None
) -> Outcome | None:
    """Train a run to its end, or go on with it, and judge its student; None where it was stopped before.

    Raises:
        PotstillError: as `train`.
    """
    result = train(run.config, should_stop=should_stop, on_record=on_record)
    if not result.finished:
        return None
    measures, notes = judge(run.config.run_dir / "model", run.base, run.asked)
    outcome = Outcome(
        cell=run.cell,
        seed=run.seed,
        config=run.config.to_json(),
        base=run.base.to_json(),
        tokens=result.tokens,
        seconds=result.seconds,
        measures=measures,
        asked=run.fingerprint,
        notes=notes,
        curve=_curve(run.config),
    )
    outcome.save(out)
    return outcome


def _curve(config: TrainConfig) -> list[Point]:
    """The looks at the held-out rows, with the tokens and seconds of the step before each."""
    tokens, seconds, points = 0, 0.0, []
    for record in read_metrics(config.run_dir):
        if "loss" in record:
            tokens, seconds = record["tokens"], record["seconds"]
        elif "held_out" in record:
            points.append(Point(tokens, seconds, record["held_out"]["ce"]))
    return points
