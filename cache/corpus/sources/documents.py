"""Kinds of documents: text, token ids, messages, or what a model wrote; and the records that are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput

Messages: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Text:
    """A text, in pieces that are short where it comes from a text file."""

    where: str
    """File and record, for errors."""
    pieces: Iterable[str]
    record: Mapping[str, Any] | None = None
    """All fields of the record that it is of, where the field asked for them and there is one."""


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids, in blocks [T] of any integer type."""

    where: str
    blocks: Iterable[NDArray[np.integer[Any]]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, each an object with at least `role`, for the tokenizer's chat template."""

    where: str
    messages: Messages
    last_only: bool = False
    """Learn of the assistant's messages only the last."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that a model wrote, with the prompt that it answers, and when."""

    where: str
    prompt: str | Messages | None
    """None where it is not recorded."""
    text: str
    model: str
    created: int
    """Seconds since 1970."""


Document: TypeAlias = Text | Ids | Conversation | Completion


@dataclass(frozen=True, slots=True)
class Field:
    """Key or column of records that holds the document, and what it holds."""

    kind: Literal["text", "ids", "messages", "completion"] = "text"
    name: str = "text"
    """Not used for completions, which are whole records."""
    whole: bool = False
    """Give the other fields of the record beside a text."""
    written_by: str | None = None
    """Model of completions whose record names none."""
    written_at: int | None = None
    """Time of completions whose record has none, in seconds since 1970."""

    @property
    def option(self) -> str:
        """Option of the command that names it."""
        assert self.kind != "completion", "whole records"
        return f"--{self.kind}-field"


class BadRecord(Exception):
    """A record that holds no document; the message names file, record and field."""


class BadRecords:
    """Takes what is said of bad records: the first ends the ingest, or all are counted and left out."""

    def __init__(self, *, skip: bool) -> None:
        self.count = 0
        self.first = ""
        """Message of the first that was left out."""
        self.skip = skip

    def add(self, message: str) -> None:
        """Count a record that is left out.

        Raises:
            InvalidInput: bad records are not to be left out.
        """
        if not self.skip:
            raise self.refusal(message, "mend it")
        self.first = self.first or message
        self.count += 1

    @staticmethod
    def refusal(message: str, mend: str) -> InvalidInput:
        """Make the error of a record that is not left out; `mend` says what else can be done."""
        return InvalidInput(f"{message}; {mend}, or leave bad records out with --skip-bad")
