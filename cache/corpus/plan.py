"""Wishes of an ingest, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from potstill.cache.corpus.sources import Field
from potstill.cache.corpus.sources.authorship import Authorship
from potstill.cache.corpus.sources.completions import seconds
from potstill.cache.errors import InvalidInput, LimitExceeded

# Largest row or shard: more than any machine holds, and small enough that no sum with a position overflows int64.
_MOST = 1 << 40

CompletionStyle = Literal["context", "learn", "alone", "chat"]
SpecialTokensPolicy = Literal["split", "keep", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestPlan:
    """Sizes of rows and shards, where the documents are, and what is done about control tokens and bad records.

    Raises:
        InvalidInput: a size is below 1, two fields are named, or the time is none. LimitExceeded: a size is over 2**40.
    """

    row_tokens: int = 512
    """Longest row, in tokens."""
    shard_positions: int | None = None
    """Most positions of a shard, the unit of work and of commit; a row that is longer gets a shard of its own. None
    for `fitting_shard_positions`."""
    text_field: str = "text"
    """Key or column of records that holds text; not used where one of the next two, of which one may be, is given."""
    ids_field: str | None = None
    """Key or column that holds lists of token ids."""
    messages_field: str | None = None
    """Key or column that holds lists of messages, for the tokenizer's chat template."""
    completions: CompletionStyle | None = None
    """Take records as what models wrote, and the prompt as context, as text to be learnt, not at all, or as messages
    for the chat template; None for other records."""
    written_by: str | None = None
    """Model of completions whose record names none."""
    written_at: str | None = None
    """Time of completions whose record has none, in ISO 8601 or seconds since 1970."""
    append_eos: bool = False
    """Put the tokenizer's EOS behind each document, before it is cut into rows."""
    prepend_bos: bool = False
    """Put the tokenizer's BOS before each document, before it is cut into rows."""
    special_tokens: SpecialTokensPolicy = "split"
    """Treatment of control tokens that stand in a text: take them as the text that they are, keep them as control
    tokens, or refuse the text."""
    skip_bad: bool = False
    """Leave out records that hold no document, and count them."""
    skip_unknown: bool = False
    """Leave out files of unknown kinds in folders."""

    def __post_init__(self) -> None:
        if self.ids_field is not None and self.messages_field is not None:
            raise InvalidInput("--ids-field and --messages-field name one place of documents each; give one")
        self._check_completions()
        for name in ("row_tokens", "shard_positions"):
            option, size = f"--{name.replace('_', '-')}", getattr(self, name)
            if size is None:
                continue
            if size < 1:
                raise InvalidInput(f"{option} is {size}; it must be at least 1")
            if size > _MOST:
                raise LimitExceeded(f"{option} is {size}; it must be at most {_MOST}")

    def _check_completions(self) -> None:
        if self.completions is not None and (self.ids_field, self.messages_field) != (None, None):
            raise InvalidInput("--completions takes whole records; leave --ids-field and --messages-field out")
        for name in ("written_by", "written_at"):
            if self.completions is None and getattr(self, name) is not None:
                raise InvalidInput(f"--{name.replace('_', '-')} is said of completions only; add --completions context")
        if self.written_at is not None and self._written_at is None:
            raise InvalidInput(
                f"--written-at is {self.written_at!r}, which is no time; give 2024-05-31 or seconds since 1970"
            )

    @property
    def _written_at(self) -> int | None:
        at = self.written_at
        return seconds(int(at) if at is not None and at.isdecimal() and len(at) > len("20240531") else at)

    @property
    def field(self) -> Field:
        """Place of the documents in records."""
        if self.completions is not None:
            return Field("completion", "", written_by=self.written_by, written_at=self._written_at)
        if self.ids_field is not None:
            return Field("ids", self.ids_field)
        if self.messages_field is not None:
            return Field("messages", self.messages_field)
        return Field("text", self.text_field)


@dataclass(slots=True)
class Places:
    """Counts documents of one kind, and remembers where the first is."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Count one more."""
        self.first = self.first or where
        self.count += 1


@dataclass(slots=True, kw_only=True)
class Found:
    """Counts of what an ingest came across, which grow while it runs."""

    bad_records: int = 0
    first_bad: str = ""
    """Fault of the first of them."""
    empty: Places = field(default_factory=Places)
    """Documents without a token, which the corpus does not have."""
    untaught: Places = field(default_factory=Places)
    """Conversations of which nothing is to be learnt."""
    roles: Counter[str] = field(default_factory=Counter)
    """Number of messages of each role."""
    authorship: Authorship = field(default_factory=Authorship)
    """Who wrote the completions."""
    unknown_files: int = 0
    began_with_bos: int = 0
    """Documents that had BOS at their beginning before it was put there."""
    ended_with_eos: int = 0
    """Documents that had EOS at their end before it was put there, where it was asked for."""
    control_tokens: Counter[str] = field(default_factory=Counter)
    """Number of times that each stood in a text, or in the contents of messages."""
