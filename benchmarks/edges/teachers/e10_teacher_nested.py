"""A teacher whose config.json has a text_config (Idefics 3, which also sees): scored against a plain forward."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import numpy as np

from potstill.cache import Fields
from potstill.cache.entry_points import open_teacher
from potstill.cache.errors import PotstillError
from tests.support.tiny_models import make_tiny_tokenizer


def make_nested(folder: Path) -> Path:
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    make_tiny_tokenizer(folder)
    text = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"max_position_embeddings": 256, "initializer_range": 0.4, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Idefics3Config(text_config=text, vision_config=vision, image_token_id=511, pad_token_id=0)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("dtype", None)
    saved["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


async def score(folder: Path) -> None:
    """Print the largest difference of a top-k of one row from a plain forward."""
    import torch
    from transformers import AutoModelForImageTextToText

    row = np.arange(5, 105, dtype=np.uint32)
    try:
        async with open_teacher(str(folder)) as teacher:
            [targets] = await teacher.score([row], Fields(k=16))
    except PotstillError as error:
        print(f"{error.kind}: {error.detail}"[-100:])
        return
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        exact = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].log_softmax(-1).numpy()
    theirs = np.take_along_axis(exact, targets.ids.astype(np.int64), axis=1)
    print(f"|logprob - plain forward| at most {np.abs(targets.logprobs - theirs).max():.5f} nats")


if __name__ == "__main__":
    logging.disable()
    asyncio.run(score(make_nested(Path("model"))))
