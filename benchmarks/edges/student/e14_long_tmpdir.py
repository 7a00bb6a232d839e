"""Training on Ray under a TMPDIR of over 100 bytes."""

import os
import sys
from pathlib import Path

from tests.support.tiny_runs import config_of, write_cache


def main() -> None:
    """Train a step on a Ray of its own."""
    folder = Path.cwd() / ("long" * 25)
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    os.environ.pop("RAY_TMPDIR", None)
    from potstill.student_trainer.launch.ray import train_with_ray

    root = write_cache(Path.cwd(), documents=20)
    try:
        result = train_with_ray(config_of(root, Path("run").absolute(), data={"held_out": 2}, train={"steps": 1}))
        print(f"trained to step {result.step}")
    except OSError as error:
        print(f"{type(error).__name__}: {error}"[:100])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
