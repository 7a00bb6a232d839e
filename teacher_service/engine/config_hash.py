"""Hash of what a model's `config.json` says of its numbers: two folders of the same weights may compute differently."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_NEUTRAL = frozenset(
    (
        "_name_or_path", "name_or_path", "_commit_hash", "auto_map",  # names and places
        "transformers_version", "_attn_implementation", "attn_implementation", "use_cache",  # versions and ways
        "torch_dtype", "dtype",  # an identity has what the engine took
        "output_attentions", "output_hidden_states", "return_dict", "torchscript",  # what is answered
        "id2label", "label2id", "task_specific_params", "problem_type",
    )
)  # fmt: skip
"""Keys, at any depth, that change no number. What is not known here counts: too many teachers beat mixed-up ones."""


def config_sha256(config: Mapping[str, Any], neutral: frozenset[str] = _NEUTRAL) -> str:
    """SHA-256, in hex, of what a `config.json` holds, without its neutral keys and those that are null."""
    return hashlib.sha256(json.dumps(_plain(config, neutral), sort_keys=True).encode()).hexdigest()


def _plain(value: Any, neutral: frozenset[str]) -> Any:
    """One form for each meaning: JSON writers differ in nulls, and in 10000 and 10000.0."""
    if isinstance(value, dict):
        return {key: _plain(each, neutral) for key, each in value.items() if key not in neutral and each is not None}
    if isinstance(value, list):
        return [_plain(each, neutral) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
