"""A bfloat16 checkpoint is trained for a step: the size of the model that comes out."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import VOCAB, config_of, write_cache


def main() -> None:
    """Train from a random checkpoint and compare the files of weights."""
    root = write_cache(Path.cwd(), documents=20)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    model.to(torch.bfloat16).save_pretrained("start")
    student = {"config": None, "checkpoint": str(Path("start").absolute())}
    train(config_of(root, Path("run").absolute(), data={"held_out": 2}, student=student, train={"steps": 1}))
    before, after = (Path(folder, "model.safetensors").stat().st_size for folder in ("start", "run/model"))
    print(f"{after / before:.2f} times the size of its checkpoint")


if __name__ == "__main__":
    main()
