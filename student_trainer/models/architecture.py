"""The `transformers` config of a student: what was asked for, made to fit the corpus, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

import potstill.student_trainer.models.lokilm  # noqa: F401 -- makes it known to transformers
from potstill.cache.errors import InvalidInput
from potstill.student_trainer.models.presets import PRESETS
from potstill.student_trainer.models.settings import StudentConfig

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NO_EFFECT = {
    "dtype": "the forward pass has train.dtype, and the published model train.save_dtype",
    "torch_dtype": "the forward pass has train.dtype, and the published model train.save_dtype",
    "loss_type": "the loss is that of train.alpha",
    "problem_type": "the student is a language model",
    "num_labels": "the student is a language model",
    "id2label": "the student is a language model",
    "label2id": "the student is a language model",
    "classifier_dropout": "the student is a language model",
}
"""Keys that a causal language model has and training reads nothing of, and why."""


def student_settings(student: StudentConfig, vocab_size: int) -> Any:
    """Make the config of a student with random weights, or read that of a checkpoint.

    The config class's own begin, end and padding ids are another tokenizer's: those that nobody typed become None.

    Raises:
        InvalidInput: a key without effect, or an id that the corpus's tokenizer does not have.
        ValueError, OSError, KeyError, ...: transformers does not take it.
    """
    if student.preset is not None:
        config = _of_keys(PRESETS[student.preset], vocab_size)
    elif isinstance(student.config, dict):
        config = _of_keys(student.config, vocab_size)
    else:
        config = AutoConfig.from_pretrained(student.checkpoint or student.config)
    _require_known_ids(config.get_text_config(), vocab_size)
    return config


def set_special_ids(model: PreTrainedModel, ids: Mapping[str, int]) -> None:
    """Take those of `SPECIAL_IDS` that the model's config leaves open from `ids`, for the model and for generation.

    Without a padding id, generation pads with the id that ends a text.
    """
    config, generation = model.config.get_text_config(), model.generation_config
    for name in SPECIAL_IDS:
        if getattr(config, name, None) is None and name in ids:
            setattr(config, name, ids[name])
        if generation is not None and getattr(generation, name) is None:
            setattr(generation, name, getattr(config, name, None))
    if generation is not None and generation.pad_token_id is None:
        end = generation.eos_token_id
        generation.pad_token_id = end[0] if isinstance(end, list) else end


def _of_keys(keys: Mapping[str, Any], vocab_size: int) -> Any:
    for key, why in _NO_EFFECT.items():
        if key in keys:
            raise InvalidInput(f"student.config.{key} is {keys[key]!r}, which has no effect: {why}; leave it out")
    open_keys = {"vocab_size": vocab_size, **dict.fromkeys(SPECIAL_IDS)}
    default = AutoConfig.for_model(keys["model_type"])
    _require_known_keys(default, keys)
    if default.get_text_config() is default:
        config = AutoConfig.for_model(**{**open_keys, **keys})
    else:
        config = AutoConfig.for_model(**{**keys, "text_config": {**open_keys, **keys.get("text_config", {})}})
        keys = keys.get("text_config", {})
        _require_known_keys(config.get_text_config(), keys)
    _require_router_loss(config.get_text_config(), keys)
    return config


def _require_known_keys(config: Any, keys: Mapping[str, Any]) -> None:
    # A key that a model type does not have is kept as it is, unread: a typo would go unseen.
    known = {
        *inspect.signature(type(config).__init__).parameters,
        *PretrainedConfig().to_dict(),
        *config.attribute_map,
        *SPECIAL_IDS,
    }
    unknown = sorted(keys.keys() - known)
    if unknown:
        nested = "" if config.get_text_config() is config else "; those of its text model go into text_config"
        raise ValueError(f"model_type {config.model_type!r} has no key {unknown[0]!r}{nested}")


def _require_router_loss(config: Any, keys: Mapping[str, Any]) -> None:
    """Refuse the coefficient of a router loss that is not asked for."""
    for key in ("router_aux_loss_coef", "aux_loss_coef"):
        if keys.get(key) and not getattr(config, "output_router_logits", False):
            raise InvalidInput(
                f"student.config.{key} is {keys[key]!r}, which has no effect while output_router_logits is false; "
                "set that to true, or leave the coefficient out"
            )


def _require_known_ids(config: Any, vocab_size: int) -> None:
    for name in SPECIAL_IDS:
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(found, int) and found >= vocab_size for found in ids):
            raise InvalidInput(
                f"student {name} is {value}, but the corpus's tokenizer has {vocab_size} ids; leave it out of the "
                "config to take the tokenizer's, or name one that it has"
            )
