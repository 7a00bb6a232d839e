"""Activations that are computed again in the backward pass in place of being kept."""

from __future__ import annotations

from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput


def compute_again(student: PreTrainedModel) -> None:
    """Keep no activations of a layer but its inputs, while the student trains; the gradients are the same.

    Raises:
        InvalidInput: the model has no such layers.
    """
    if not student.supports_gradient_checkpointing:
        raise InvalidInput(
            f"train.activation_checkpointing is true, but model_type {student.config.model_type!r} has no layers that "
            "can be computed again; leave it out"
        )
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
