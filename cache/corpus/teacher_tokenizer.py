"""The tokenizer of a teacher that runs here: its table of ids, and the BOS that it puts before text by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer

from potstill.cache.corpus.tokenizer_files import declared_bos, load_tokenizer_files


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTokenizer:
    """The tokenizer of a model's folder."""

    tokenizer: Tokenizer
    bos_id: int | None
    """Id that it puts before text; None where it puts none."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: Path | None = None) -> TeacherTokenizer:
        """Join a tokenizer with what the files beside it in the model's folder say.

        Raises:
            InvalidInput: as of `load_tokenizer_files`.
        """
        return cls(tokenizer, declared_bos(tokenizer, {} if folder is None else load_tokenizer_files(folder)))


@runtime_checkable
class HasTokenizer(Protocol):
    """A teacher whose tokenizer is at hand; of one in another process only the fingerprint is known."""

    @property
    def tokenizer(self) -> TeacherTokenizer:
        """The model's tokenizer."""
