"""Students: any causal language model of `transformers`, from a config or a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from potstill.cache.errors import InvalidInput, LimitExceeded
from potstill.cache.plurals import counted
from potstill.student_trainer.config import StudentConfig


def build_student(student: StudentConfig, *, seed: int, vocab_size: int, row_tokens: int) -> PreTrainedModel:
    """Build a float32 model on the CPU; random weights depend on the config and the seed only.

    Args:
        student: what to build.
        seed: of the random weights; unused for a checkpoint.
        vocab_size: the corpus's; the student needs at least as many ids, and takes it where its config
            names none.
        row_tokens: the corpus's longest row, in tokens.

    Raises:
        InvalidInput: transformers cannot make a causal language model of it, or the vocabulary is too small.
        LimitExceeded: rows are longer than the student's positions.
    """
    with quiet_transformers():
        try:
            model = _load(student, seed, vocab_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
            raise InvalidInput(
                f"student cannot be built from {student.checkpoint or student.config!r}: {error}"
            ) from error
    config = model.config
    if config.vocab_size < vocab_size:
        raise InvalidInput(
            f"student vocab_size is {config.vocab_size}; the corpus's tokenizer has {vocab_size} ids: use at least that"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < row_tokens:
        raise LimitExceeded(
            f"student max_position_embeddings is {positions}, but the corpus has a row of "
            f"{counted(row_tokens, 'token')}"
        )
    return model


def load_student(folder: Path) -> PreTrainedModel:
    """Load a student that `save_student` wrote: float32, bit for bit, on the CPU."""
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    return model


def save_student(model: PreTrainedModel, folder: Path) -> None:
    """Write the config.json and safetensors that `AutoModelForCausalLM.from_pretrained` loads."""
    with quiet_transformers():
        model.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' own progress bars within the block: ours is on the same terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load(student: StudentConfig, seed: int, vocab_size: int) -> PreTrainedModel:
    if student.checkpoint is not None:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            student.checkpoint, dtype=torch.float32, use_safetensors=True
        )
        return loaded
    config = _config(student, vocab_size)
    # The caller's random stream stays as it was: building a student must not change the dropout of another.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _config(student: StudentConfig, vocab_size: int) -> Any:
    if not isinstance(student.config, dict):
        return AutoConfig.from_pretrained(student.config)
    config = AutoConfig.for_model(**{"vocab_size": vocab_size, **student.config})
    # A key that a model type does not have is kept as it is, unread: a typo would go unseen.
    known = {
        *inspect.signature(type(config).__init__).parameters,
        *PretrainedConfig().to_dict(),
        *config.attribute_map,
    }
    unknown = sorted(student.config.keys() & config.to_dict().keys() - known)
    if unknown:
        raise ValueError(f"model_type {config.model_type!r} has no key {unknown[0]!r}")
    return config
