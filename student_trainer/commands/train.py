"""`potstill train CONFIG.toml`: train a student, or go on with one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potstill.student_trainer.config import TrainConfig

SUMMARY = "train a student from cached or served teacher targets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to train, on what, from whom")
    parser.add_argument("--out", metavar="DIR", help="the run's folder, instead of the config's train.out")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--no-ray", action="store_true", help="train in this process, with one worker")
    place.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="use the Ray cluster at ADDRESS; by default Ray is started on this machine",
    )


def run(args: argparse.Namespace) -> int:
    """Train until done or asked to stop. 0 when done; 128 + signal when stopped, with a checkpoint."""
    from rich.console import Console

    from potstill.student_trainer.checkpoint.stored import bring_run
    from potstill.student_trainer.config import TrainConfig
    from potstill.student_trainer.evaluate.result import finished_before
    from potstill.student_trainer.launch.ending import tell_end

    _check_not_one_of_many()
    config = TrainConfig.from_toml(args.config, out=args.out)
    if args.no_ray:
        _check_alone(config)

    brought = bring_run(config)
    finished = finished_before(config)
    if finished is not None:
        print(f"finished before, at step {finished.step}; ask for more train.steps, or choose another --out")
        tell_end(finished, config)
        return 0

    from potstill.student_trainer.metrics.progress import begun, showing
    from potstill.student_trainer.train.interrupt import stop_on_signals
    from potstill.student_trainer.train.named import require_named

    require_named(config)
    from potstill.student_trainer.train.loop import train

    console = Console()
    where = "in this process" if args.no_ray else "on Ray, whose start takes half a minute"

    def begin(step: int) -> None:
        console.print(begun(step, where), highlight=False)

    with stop_on_signals() as stop, showing(config.train.steps, console) as show:
        if args.no_ray:
            result = train(config, should_stop=stop, on_record=show, on_begin=begin, brought=brought)
        else:
            from potstill.student_trainer.launch.ray import train_with_ray

            result = train_with_ray(
                config, address=args.ray, should_stop=stop, on_record=show, on_begin=begin, brought=brought
            )
    tell_end(result, config)
    return 0 if result.finished else 128 + stop.signal_number


def _check_not_one_of_many() -> None:
    import os

    from potstill.cache.errors import InvalidInput

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InvalidInput(
            "torchrun has started this process, and each of its workers would train alone; start it as `torchrun -m "
            "potstill.student_trainer.launch.torchrun CONFIG.toml`, or without torchrun"
        )


def _check_alone(config: TrainConfig) -> None:
    from potstill.cache.errors import InvalidInput

    if config.train.workers_range[0] > 1:
        raise InvalidInput(f"train.workers is {config.train.workers}, but --no-ray trains with 1; set it to 1")
    if config.train.parallel == "fsdp":
        raise InvalidInput('train.parallel is "fsdp", but --no-ray trains with 1 worker; leave it out')
