"""A LoRA adapter as `peft` saves it: a folder with an `adapter_config.json`, which names the base model.

vLLM adds it to the base model's layers while it computes. What it does not add is refused, with the way to a model
folder of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_json_object
from potstill.cache.types import TeacherIdentity
from potstill.teacher_service.engine.config_hash import config_sha256
from potstill.teacher_service.engine.model_folder import weights_sha256

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_LORA_WEIGHT = re.compile(r"(?:.*\.)?(?P<module>[^.]+)\.lora_[AB](?:\.default)?\.weight")
_NEUTRAL = frozenset(
    (
        "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type",  # names and versions
        "inference_mode", "lora_dropout", "corda_config", "eva_config", "loftq_config",  # training
        "ensure_weight_tying", "runtime_config", "megatron_config", "megatron_core",
    )
)  # fmt: skip
"""Keys that change no number of a trained adapter."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
_PLAIN_BEGINNINGS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
"""Ways to begin the training of an adapter that leave the base model as it is."""
_HEADS = {"lm_head", "embed_tokens"}
"""Modules for which vLLM adds nothing at the positions of a prompt but the last."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's folder, read."""

    folder: Path
    base: str
    """Folder of the base model, or its name on the hub."""
    room: int
    """Least rank that vLLM makes room for in which the adapter fits."""
    modules: tuple[str, ...]
    """Names of the modules that it changes, like `q_proj`."""
    sha256: str
    """Hash of its weights and of what changes numbers in its configuration."""

    @classmethod
    def find(cls, model: str, base: str) -> Adapter | None:
        """Read the adapter of a folder; None where `model` is something else.

        Args:
            model: a model as vLLM takes it, or an adapter's folder.
            base: the base model; empty for the one that the adapter names.

        Raises:
            InvalidInput: it is no adapter that vLLM can add, or `base` was given for something else.
        """
        folder = Path(model)
        # A merged model may have kept the file.
        if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
            if base:
                raise InvalidInput(f"base is {base!r}, but {model!r} is no adapter: it has no {ADAPTER_CONFIG}")
            return None
        config = read_json_object(folder / ADAPTER_CONFIG)
        named = base or config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise InvalidInput(
                f"the {ADAPTER_CONFIG} of {folder.name!r} names no base model; give the option base=MODEL"
            )
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        modules = _modules(folder / WEIGHTS)
        reason = _why_not(config, ranks, modules)
        if reason:
            raise InvalidInput(
                f"the adapter {folder.name!r} {reason}; merge it first: peft's PeftModel.from_pretrained(base, adapter)"
                ".merge_and_unload().save_pretrained(FOLDER), and give that folder, with the tokenizer"
            )
        digest = hashlib.sha256((weights_sha256(folder) + config_sha256(config, _NEUTRAL)).encode())
        room = next(room for room in _RANKS if room >= max(ranks))
        return cls(folder, named, room, tuple(sorted(modules)), digest.hexdigest())

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `vllm.EngineArgs` that make room for it."""
        # By their names: otherwise vLLM prepares the head, too, in a way that fits one position a row.
        return {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": self.room,
            "lora_target_modules": list(self.modules),
        }

    def added_to(self, base: TeacherIdentity) -> TeacherIdentity:
        """Make the identity of the two together from that of the base model."""
        return replace(base, model=f"{base.model}+{self.folder.resolve().name}", adapters=(self.sha256,))


def _modules(weights: Path) -> set[str]:
    """Names of the modules that the weights are of, like `q_proj`, by the head of the file; none without a file.

    Raises:
        InvalidInput: it is no file of safetensors, or has weights that are not of a LoRA.
    """
    if not weights.is_file():
        return set()
    try:
        with weights.open("rb") as file:
            names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        kinds = {name: _LORA_WEIGHT.fullmatch(name) for name in names if name != "__metadata__"}
    except (OSError, ValueError, OverflowError, MemoryError, TypeError) as error:
        raise InvalidInput(f"{WEIGHTS} of {weights.parent.name!r} cannot be read: {error}") from error
    return {name if kind is None else kind["module"] for name, kind in kinds.items()}


def _why_not(config: dict[str, Any], ranks: list[Any], modules: set[str]) -> str:
    """Reason for which vLLM cannot add the adapter; empty where it can."""
    if config.get("peft_type") != "LORA":
        return f"is of peft_type {config.get('peft_type')!r}, not LORA"
    if not all(type(rank) is int and 1 <= rank <= _RANKS[-1] for rank in ranks):
        return f"has rank {ranks[0]!r}; vLLM takes 1 to {_RANKS[-1]}"
    if not modules:
        return f"has no {WEIGHTS}"
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "has DoRA or biases, which vLLM does not add"
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower() not in _PLAIN_BEGINNINGS:
        return f"was begun by {begun!r}, which changes the base model's own weights"
    strange = sorted(name for name in modules if name in _HEADS or "." in name)
    return f"changes {strange[0]}, which vLLM does not add" if strange else ""
