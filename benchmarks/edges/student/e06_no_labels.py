"""Held-out rows of one token each, which have no label: the cross-entropy of their evaluation."""

import json
from pathlib import Path

from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, fill, write_texts_cache


def main() -> None:
    """Train a step and print what `summary.json` has."""
    root = write_texts_cache(Path.cwd(), [f"w{i}" for i in range(1, 20)])
    fill(root, "fake")
    train(config_of(root, Path("run").absolute(), train={"steps": 1}))
    held_out = json.loads(Path("run/summary.json").read_text())["held_out"]
    print(f"ce {json.dumps(held_out['ce'])} of {held_out['tokens']} tokens in rows of one")


if __name__ == "__main__":
    main()
