"""Students made of some layers of a larger model: the layers are copied with the embeddings, the norms and the head.

A student that starts so speaks within a few steps, where one of random weights needs many (docs/guide/training.md).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Build a float32 model of the same kind from some layers of `model`, in the given order.

    Args:
        model: a causal language model on the CPU.
        layers: indexes of decoder layers, from 0; a layer may be taken twice.

    Raises:
        InvalidInput: a layer is not there, or the model's layers are not numbered one by one in its weights.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    wrong = next((layer for layer in layers if not 0 <= layer < depth), None)
    if wrong is not None:
        raise InvalidInput(
            f"student.layers has {wrong}, but {model.config.name_or_path!r} has {counted(depth, 'layer')}; "
            f"choose from 0 to {depth - 1}"
        )
    text.num_hidden_layers = len(layers)
    for name, value in _per_layer(text, depth).items():
        setattr(text, name, [value[layer] for layer in layers])
    with torch.random.fork_rng(devices=[]):
        student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = model.state_dict()
    numbered = _numbered_prefix(weights, depth)
    try:
        student.load_state_dict({name: weights[_source(name, numbered, layers)] for name in student.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise InvalidInput(
            f"student.layers cannot be taken of model_type {config.model_type!r}, whose layers differ from each "
            f"other: {str(error).splitlines()[0]}"
        ) from error
    return student


def _per_layer(config: Any, depth: int) -> dict[str, list[Any]]:
    """Keys of a config that name something for each layer, like `layer_types`."""
    return {
        name: list(value)
        for name, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == depth and name.startswith(("layer", "no_rope_layers"))
    }


def _numbered_prefix(weights: dict[str, torch.Tensor], depth: int) -> str:
    """Find what stands in front of a layer's number in the names of weights, like `model.layers.`."""
    found: dict[str, set[int]] = {}
    for name in weights:
        match = re.match(r"(.*?\.)(\d+)\.", name)
        if match:
            found.setdefault(match.group(1), set()).add(int(match.group(2)))
    prefixes = [prefix for prefix, numbers in found.items() if numbers == set(range(depth))]
    if len(prefixes) != 1:
        raise InvalidInput("student.layers needs a checkpoint whose weights number its layers; name one that does")
    return prefixes[0]


def _source(name: str, numbered: str, layers: Sequence[int]) -> str:
    """Name in the larger model of a weight of the student."""
    if not name.startswith(numbered):
        return name
    number, _, rest = name[len(numbered) :].partition(".")
    return f"{numbered}{layers[int(number)]}.{rest}"
