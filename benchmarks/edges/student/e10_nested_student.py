"""A student whose config is nested, a tiny random Gemma 3 with its image tower."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, write_cache


def main() -> None:
    """Train a step from the checkpoint and load what comes out."""
    root = write_cache(Path.cwd(), documents=20)
    text = {key: value for key, value in STUDENT.items() if key != "model_type"}
    text |= {"vocab_size": VOCAB, "head_dim": 16, "num_key_value_heads": 1}
    tower = {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    vision = {"hidden_size": 16, "intermediate_size": 16, **tower}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    AutoModelForCausalLM.from_config(config).save_pretrained("start")
    student = {"config": None, "checkpoint": str(Path("start").absolute())}
    try:
        result = train(config_of(root, Path("run").absolute(), student=student, train={"steps": 1}))
    except (AttributeError, KeyError, TypeError) as error:
        print(f"traceback, {type(error).__name__}: {error}"[:100])
        return
    loaded = AutoModelForCausalLM.from_pretrained("run/model")
    print(f"{type(loaded).__name__} trained to step {result.step}, and loads")


if __name__ == "__main__":
    main()
