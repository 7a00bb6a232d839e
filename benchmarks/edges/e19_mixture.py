"""Two corpora are trained on at 0.8 and 0.2: rows of each, alike on 1, 2 and 3 workers and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from potstill.cache.errors import PotstillError
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run
from tests.support.tiny_runs import config_of, write_cache


def mixed(folder: Path, out: str, **data: Any) -> TrainConfig:
    """Make a config of a run of both corpora."""
    corpora = [{"name": "docs", "weight": 0.8}, {"name": "more", "weight": 0.2}]
    return config_of(folder / "cache", folder / out, data={"corpus": None, "corpora": corpora, **data})


def rows_drawn(config: TrainConfig, count: int) -> tuple[list[int], bool]:
    """Count the rows of each corpus among the first ones; tell if 1, 2 and 3 workers draw the same."""
    with open_run(config) as run:
        rows, steps = run.order.take(0, count), count // config.train.batch_rows
        drawn = np.bincount(np.searchsorted(run.corpora.first_rows, rows, side="right") - 1)
        parts = (
            np.concatenate(
                [run.order.rank_slice(step, rank, workers) for step in range(steps) for rank in range(workers)]
            )
            for workers in (1, 2, 3)
        )
        return drawn.tolist(), all(np.array_equal(part, rows) for part in parts)


def resumed_is_straight(folder: Path) -> bool:
    """Train straight, and with a stop in the middle; tell if all losses are equal."""
    train(mixed(folder, "straight"))
    asked: list[bool] = []

    def stops() -> bool:
        asked.append(True)
        return len(asked) == 5

    train(mixed(folder, "resumed"), should_stop=stops)
    train(mixed(folder, "resumed"))
    losses = (
        [each["loss"] for each in read_metrics(folder / out) if "loss" in each] for out in ("straight", "resumed")
    )
    return next(losses) == next(losses)


def main(folder: Path) -> str:
    """Try it all and say what happened."""
    write_cache(folder, documents=60)
    write_cache(folder, documents=20, corpus="more", seed=1)
    try:
        (docs, more), same = rows_drawn(mixed(folder, "drawn"), 400)
    except PotstillError as error:
        return str(error)
    told = "the same" if same and resumed_is_straight(folder) else "not the same"
    return f"{docs} and {more} of 400 rows, {told} on 1, 2, 3 workers and after a resume"


if __name__ == "__main__":
    print(main(Path.cwd()))
