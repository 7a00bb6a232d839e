"""The folder of a LoRA adapter as a teacher: scored against a forward of the model merged in float64."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from potstill.cache import Fields
from potstill.cache.entry_points import open_teacher
from potstill.cache.errors import PotstillError
from tests.support.tiny_models import make_tiny_llama


def make_adapter(base: Path, folder: Path) -> Any:
    """Save an adapter as peft does; the merged model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    weights: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            a, b = torch.randn(4, module.in_features) * 0.3, torch.randn(module.out_features, 4) * 0.3
            weights |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data = (module.weight.double() + 3.0 * (b.double() @ a.double())).float()
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base.resolve())}))
    return model


async def score(folder: Path, model: Any) -> None:
    """Print the largest difference of a top-k of one row from the merged model."""
    import torch

    row = np.arange(5, 105, dtype=np.uint32)
    try:
        async with open_teacher(str(folder)) as teacher:
            [targets] = await teacher.score([row], Fields(k=16))
    except PotstillError as error:
        print(f"{error.kind}: {error.detail}"[:100])
        return
    with torch.no_grad():
        exact = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].log_softmax(-1).numpy()
    theirs = np.take_along_axis(exact, targets.ids.astype(np.int64), axis=1)
    print(f"|logprob - merged model's| at most {np.abs(targets.logprobs - theirs).max():.5f} nats")


if __name__ == "__main__":
    logging.disable()
    merged = make_adapter(make_tiny_llama(Path("base")), Path("adapter"))
    asyncio.run(score(Path("adapter"), merged))
