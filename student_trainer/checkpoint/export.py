"""The model that a finished run publishes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from potstill.cache.corpus import Corpus
from potstill.student_trainer.checkpoint.replaced import replaced
from potstill.student_trainer.models.build import save_student
from potstill.student_trainer.models.corpus_tokenizer import save_tokenizer


def publish_model(folder: Path, model: PreTrainedModel, corpus: Corpus, dtype: str) -> None:
    """Save the final model with the corpus's whole tokenizer at `folder`, in place of one that is there.

    Args:
        folder: where.
        model: the student; its weights are of `dtype` from here on.
        corpus: the one that it was trained on.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        StoreError: the disk does not take it.
    """
    with replaced(folder) as partial:
        save_student(model.to(getattr(torch, dtype)), partial)
        save_tokenizer(corpus, partial)
