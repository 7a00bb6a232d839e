"""Settings of the student that a run begins with."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from potstill.student_trainer.settings import Frozen

Preset: TypeAlias = Literal["lokilm-1.4b", "lokilm-tiny"]


class StudentConfig(Frozen):
    """Exactly one of a preset or a `transformers` config (random weights under `train.seed`) or a checkpoint.

    Of a checkpoint some layers may be taken.
    """

    preset: Preset | None = None
    """A config by its name: LokiLM's, or a small model of its kind; with the corpus's vocabulary."""
    config: str | dict[str, Any] | None = None
    """A folder or file with a config.json, or its keys (with model_type); vocab_size defaults to the corpus's."""
    checkpoint: str | None = None
    """A folder or hub name that `AutoModelForCausalLM.from_pretrained` takes."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)] | None = None
    """The checkpoint's layers, from 0, that the student consists of, in this order; by default all."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if [self.preset, self.config, self.checkpoint].count(None) != 2:
            raise ValueError("give exactly one of preset, config and checkpoint")
        if self.layers is not None and self.checkpoint is None:
            raise ValueError("layers are taken from a checkpoint; give one in place of a config or preset")
        if isinstance(self.config, dict) and "model_type" not in self.config:
            raise ValueError("config needs a model_type, like 'llama'")
        return self
