"""A GPT-2 student on a tokenizer of 48 ids: the end-of-text id that its published model has."""

import json
from pathlib import Path

from potstill.cache.errors import PotstillError
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, write_cache


def main() -> None:
    """Train a step from default ids, and one with 50256 typed."""
    root = write_cache(Path.cwd(), documents=20)
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    told = []
    for name, keys in (("default", {}), ("typed", {"eos_token_id": 50256})):
        out = Path(name).absolute()
        config = {"data": {"held_out": 2}, "student": {"config": {**gpt2, **keys}}, "train": {"steps": 1}}
        try:
            train(config_of(root, out, **config))
            value = json.loads((out / "model" / "config.json").read_text()).get("eos_token_id")
        except PotstillError:
            value = "refused"
        told.append(f"{name} {value}")
    print(f"eos of V = 48: {', '.join(told)}")


if __name__ == "__main__":
    main()
