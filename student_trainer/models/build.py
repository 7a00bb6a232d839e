"""Students: any causal language model of `transformers`, from a config, a checkpoint or some of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from potstill.cache.errors import InvalidInput, LimitExceeded
from potstill.cache.hub import require_reachable
from potstill.cache.plurals import counted
from potstill.student_trainer.models.architecture import set_special_ids, student_settings
from potstill.student_trainer.models.layers import keep_layers
from potstill.student_trainer.models.settings import StudentConfig

SAVE_DTYPES = ("float32", "bfloat16", "float16")


def build_student(
    student: StudentConfig,
    *,
    seed: int,
    vocab_size: int,
    row_tokens: int,
    special_ids: Mapping[str, int] | None = None,
) -> tuple[PreTrainedModel, str]:
    """Build a float32 model on the CPU; random weights depend on the config and the seed only.

    Args:
        student: what to build.
        seed: of the random weights; unused for a checkpoint.
        vocab_size: the corpus's; the student needs at least as many ids, and takes it where its config
            names none.
        row_tokens: the corpus's longest row, in tokens.
        special_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as it has them; the
            student takes those that its own config leaves open.

    Returns:
        The model, and the dtype in which the checkpoint was stored; float32 for random weights.

    Raises:
        InvalidInput: transformers cannot make a causal language model of it, the vocabulary is too small, an id is
            not of it, or a key has no effect.
        LimitExceeded: rows are longer than the student's positions.
    """
    with quiet_transformers(), _told(student):
        settings = student_settings(student, vocab_size)
        stored = str(settings.get_text_config().dtype or settings.dtype).removeprefix("torch.")
        model = _load(student, settings, seed)
    _check_size(model.config.get_text_config(), vocab_size, row_tokens)
    set_special_ids(model, special_ids or {})
    _train_text(model)
    return model, stored if student.checkpoint is not None and stored in SAVE_DTYPES else "float32"


def check_student(student: StudentConfig, *, vocab_size: int, row_tokens: int) -> None:
    """Raise what `build_student` would, as far as the student's config tells; arguments as there."""
    with _told(student):
        config = student_settings(student, vocab_size).get_text_config()
    _check_size(config, vocab_size, row_tokens)


def load_student(folder: Path) -> PreTrainedModel:
    """Load a student that `save_student` wrote: float32, bit for bit, on the CPU."""
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    _train_text(model)
    return model


def load_empty_student(folder: Path) -> PreTrainedModel:
    """Build the student whose configs are in a folder, for weights that are elsewhere: float32, on the CPU."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    _train_text(model)
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


@contextmanager
def _told(student: StudentConfig) -> Iterator[None]:
    """Turn what transformers raises into one line; a checkpoint that nobody can find is told before it is asked."""
    if student.checkpoint is not None and not Path(student.checkpoint).exists():
        require_reachable(student.checkpoint, "student.checkpoint")
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError) as error:
        asked = student.checkpoint or student.preset or student.config
        raise InvalidInput(f"student cannot be built from {asked!r}: {_first_lines(error)}") from error


def _load(student: StudentConfig, settings: Any, seed: int) -> PreTrainedModel:
    if student.checkpoint is not None:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            student.checkpoint, dtype=torch.float32, use_safetensors=True
        )
        return loaded if student.layers is None else keep_layers(loaded, student.layers)
    text = settings.get_text_config()
    # Weights of a padding id would begin as zeros, where gradients are a hundred times those of other ids.
    padding, text.pad_token_id = getattr(text, "pad_token_id", None), None
    # The caller's random stream stays as it was: building a student must not change the dropout of another.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.config.get_text_config().pad_token_id = padding
    return model


def _first_lines(error: Exception) -> str:
    """Give the words of transformers, without its list of every class that it knows."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Unrecognized configuration class"):
        return f"it is no causal language model: {lines[0]}"
    # Both words begin a list of every type that there is.
    return " ".join(lines).partition(". Should contain one of")[0].partition(". Known types")[0]


def _check_size(config: Any, vocab_size: int, row_tokens: int) -> None:
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


def _train_text(model: PreTrainedModel) -> None:
    """Choose what is trained: every token's embedding, and of a model with towers for images its text model."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding):
        # Padding that also ends texts is in rows, and without this its embedding would stay as it is.
        embeddings.padding_idx = None
    if model.config.get_text_config() is model.config:
        return
    # What text does not reach has no gradient, and workers would wait for it.
    parts = (model.get_decoder(), model.get_output_embeddings())
    text = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in text)
