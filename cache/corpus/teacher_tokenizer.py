"""The tokenizer of a teacher that runs here: its table of ids, and the BOS that it puts before text by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokenizers import Tokenizer

from potstill.cache.errors import InvalidInput

_PROBE = "a"
"""Text of which a tokenizer makes at least one token."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTokenizer:
    """The tokenizer of a model's folder."""

    tokenizer: Tokenizer
    bos_id: int | None
    """Id that it puts before text; None where it puts none."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: Path | None = None) -> TeacherTokenizer:
        """Join a tokenizer with what the `tokenizer_config.json` of the model's folder, if there is one, says.

        Raises:
            InvalidInput: the file is no JSON object.
        """
        file = None if folder is None else folder / "tokenizer_config.json"
        config = _read(file) if file is not None and file.is_file() else {}
        return cls(tokenizer, declared_bos(tokenizer, config))


@runtime_checkable
class HasTokenizer(Protocol):
    """A teacher whose tokenizer is at hand; of one in another process only the fingerprint is known."""

    @property
    def tokenizer(self) -> TeacherTokenizer:
        """The model's tokenizer."""


def _read(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file.parent.name}/{file.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{file.parent.name}/{file.name} is no JSON object")
    return config


def declared_bos(tokenizer: Tokenizer, config: Mapping[str, Any]) -> int | None:
    """Id that a tokenizer puts before text by its `tokenizer_config.json`, or by its post-processor; None for none."""
    declared = config.get("add_bos_token")
    if declared is False:
        return None
    if declared is True:
        named = config.get("bos_token")
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and (bos := tokenizer.token_to_id(text)) is not None:
            return int(bos)
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    whole = tokenizer.encode(_PROBE).ids
    return int(whole[0]) if len(whole) > len(plain) and whole[:1] != plain[:1] else None
