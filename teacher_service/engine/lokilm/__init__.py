"""LokiLM's model for vLLM, so that a student of ours is a teacher: a plugin, and the check of what it computes.

vLLM calls `register` in every process that it runs in; `model` is imported for such a model only.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from potstill.cache.errors import InvalidInput

ARCHITECTURE = "LokiLMForCausalLM"
"""Name of the model in a `config.json`."""
TAKES_SLOPES = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
"""vLLM's attention backends that use the slopes of ALiBi. FlashInfer takes and forgets them, flex attention raises."""


def register() -> None:
    """Make the model known to vLLM, and its config to `transformers`; the entry point of `vllm.general_plugins`."""
    from vllm import ModelRegistry  # noqa: PLC0415 -- vLLM loads it when it is needed

    for point in entry_points(group="potstill.models"):
        point.load()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")


def require_slopes(backend: str) -> None:
    """Refuse an attention backend of vLLM, by its name, that does not compute ALiBi.

    Raises:
        InvalidInput: it is none of `TAKES_SLOPES`.
    """
    if backend not in TAKES_SLOPES:
        raise InvalidInput(
            f"vLLM's attention backend {backend} ignores the slopes of ALiBi, which this model has; choose one of "
            f"{', '.join(TAKES_SLOPES)}: attention_backend of a teacher, or --attention-backend of vllm serve"
        )
