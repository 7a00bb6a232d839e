"""A run of 6 steps goes on to 12 on the same cosine: is the jump of the learning rate said?"""

import logging
from pathlib import Path

from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, write_cache


def main() -> None:
    """Train twice and print the rates at the seam, and what was logged."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("potstill").addHandler(handler)
    root, run = write_cache(Path.cwd()), Path("run").absolute()
    for steps in (6, 12):
        train(config_of(root, run, train={"steps": steps}))
    rates = [record["lr"] for record in read_metrics(run) if "lr" in record]
    jumps = [line.partition(":")[0] for line in told if "jumps" in line]
    print(f"rate {rates[5]:.2g} then {rates[6]:.2g}; said: {jumps[0] if jumps else 'nothing'}")


if __name__ == "__main__":
    main()
