"""From conversations to token ids, with which of them are to be learnt: those that the assistant says.

Shape legend:  T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.chat_template import ChatTemplate, Rendering
from potstill.cache.corpus.control_tokens import ControlTokens, Disguised, any_of, other_names
from potstill.cache.corpus.sources import BadRecords, Conversation
from potstill.cache.corpus.sources.documents import BadRecord
from potstill.cache.corpus.sources.records import texts_in
from potstill.cache.corpus.tokenization import encoded_texts
from potstill.cache.types import Tokens

# Conversations, and characters of them, in one call of the tokenizer: it uses all cores, and 28 bytes a character.
_BATCH = 64
_BATCH_CHARACTERS = 1 << 20
_LONGEST = 1 << 24
"""Most characters of a conversation, which is tokenized as a whole."""


@dataclass(frozen=True, slots=True)
class Said:
    """A conversation's token ids [T], and bool [T] which of them the assistant says."""

    where: str
    """File and record."""
    ids: Tokens
    taught: NDArray[np.bool_]


class ConversationTokens:
    """Makes token ids of conversations by a tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        control: ControlTokens,
        disguised: Disguised | None,
        see: Callable[[str, str, int], None],
    ) -> None:
        """Take the parts.

        Args:
            tokenizer: it makes the ids where no message holds a control token.
            template: that of the tokenizer.
            control: the tokenizer's control tokens.
            disguised: it makes the ids of the others; None if control tokens in messages are to stay.
            see: told of each control token in a message: where, its name, and at what character of its text; it may
                raise BadRecord.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._control = control
        self._disguised = disguised
        self._see = see
        self._stand_ins = other_names(control.names)
        self._meant = {stand_in: name for name, stand_in in self._stand_ins.items()}
        if disguised is not None:
            self._meant |= disguised.names
        self._either = any_of(self._meant)

    def said(self, conversations: Iterable[Conversation], bad: BadRecords) -> Iterator[Said]:
        """Tokenize conversations in order; `bad` is told of those that are refused."""
        for batch in _batches(self._rendered(conversations, bad)):
            plain = [rendering.text for _, rendering, disguised in batch if not disguised]
            encoded = iter(encoded_texts(self._tokenizer, plain, batch[0][0]))
            for where, rendering, disguised in batch:
                if disguised:
                    assert self._disguised is not None
                    (found,) = encoded_texts(self._disguised.tokenizer, [rendering.text], where)
                else:
                    found = next(encoded)
                yield _said(where, found, rendering)

    def _rendered(
        self, conversations: Iterable[Conversation], bad: BadRecords
    ) -> Iterator[tuple[str, Rendering, bool]]:
        """Give the place of each, its text, and True if that is for the tokenizer with other names."""
        for conversation in conversations:
            try:
                seen = self._seen(conversation)
                other = seen and self._disguised is not None
                messages = self._replaced(conversation.messages) if other else conversation.messages
                if self._disguised is not None:
                    self._require_whole(conversation)
                rendering = self._template.render(messages, conversation.where)
                require_bounded(rendering, conversation.where)
            except BadRecord as error:
                bad.add(str(error))
                continue
            if conversation.last_only:
                rendering = Rendering(rendering.text, rendering.taught[-1:])
            rendering = self._without_space_behind(rendering)
            yield conversation.where, self._renamed(rendering) if other else rendering, other

    def _seen(self, conversation: Conversation) -> bool:
        """Tell of the control tokens in messages; True if there are some."""
        found = [each for text in texts_in(conversation.messages) for each in self._control.found(text)]
        for name, at in found:
            self._see(conversation.where, name, at)
        return bool(found)

    def _require_whole(self, conversation: Conversation) -> None:
        """Refuse a control token that arises where a template puts the parts of a message together.

        Raises:
            BadRecord: there is one.
        """
        for number, message in enumerate(conversation.messages):
            content = message.get("content")
            parts = content if isinstance(content, list) else []
            texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            whole = "".join(texts)
            if len(self._control.ends(whole, 0, len(whole))) != sum(
                len(self._control.ends(text, 0, len(text))) for text in texts
            ):
                raise BadRecord(
                    f"{conversation.where} has a control token in message {number} that begins in one part of its "
                    "content and ends in another; put the parts together"
                )

    def _replaced(self, value: Any) -> Any:
        """Copy messages with stand-ins for control tokens, wherever text is."""
        if isinstance(value, str):
            return self._control.replaced(value, self._stand_ins.__getitem__)
        if isinstance(value, list):
            return [self._replaced(each) for each in value]
        if isinstance(value, dict):
            return {self._replaced(key): self._replaced(each) for key, each in value.items()}
        return value

    def _without_space_behind(self, rendering: Rendering) -> Rendering:
        """End what is the assistant's with the token that ends a turn: a line break behind it is the template's."""
        spans = []
        for start, stop in rendering.taught:
            ends = self._control.ends(rendering.text, start, stop)
            last = ends[-1] if ends else stop
            spans.append((start, last if rendering.text[last:stop].isspace() else stop))
        return Rendering(rendering.text, tuple(spans))

    def _renamed(self, rendering: Rendering) -> Rendering:
        """Give the template's control tokens their other names, and text for the stand-ins."""
        parts, ends, shifts, at, shift = [], [0], [0], 0, 0
        for match in self._either.finditer(rendering.text):
            meant = self._meant[match[0]]
            parts += [rendering.text[at : match.start()], meant]
            at = match.end()
            shift += len(meant) - len(match[0])
            ends.append(at)
            shifts.append(shift)

        def place(character: int) -> int:
            return character + shifts[bisect_right(ends, character) - 1]

        spans = tuple((place(start), place(stop)) for start, stop in rendering.taught)
        return Rendering("".join([*parts, rendering.text[at:]]), spans)


def said_in_texts(tokenizer: Tokenizer, texts: Iterable[tuple[str, Rendering]]) -> Iterator[Said]:
    """Tokenize texts, each with its place and the spans of it that are to be learnt, in order.

    Raises:
        InvalidInput: the tokenizer cannot read one.
    """
    for batch in _batches((where, rendering, False) for where, rendering in texts):
        encoded = encoded_texts(tokenizer, [rendering.text for _, rendering, _ in batch], batch[0][0])
        for (where, rendering, _), found in zip(batch, encoded, strict=True):
            yield _said(where, found, rendering)


def _batches(rendered: Iterable[tuple[str, Rendering, bool]]) -> Iterator[list[tuple[str, Rendering, bool]]]:
    batch: list[tuple[str, Rendering, bool]] = []
    characters = 0
    for each in rendered:
        batch.append(each)
        characters += len(each[1].text)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def require_bounded(rendering: Rendering, where: str) -> None:
    """Refuse a text that is too long to be tokenized as a whole.

    Raises:
        BadRecord: it is.
    """
    size = len(rendering.text)
    if size > _LONGEST:
        raise BadRecord(
            f"{where} has {size:,} characters; a conversation or completion has at most {_LONGEST:,}: part it"
        )


def _said(where: str, encoded: Any, rendering: Rendering) -> Said:
    ids = np.array(encoded.ids, dtype=np.uint32)
    starts, stops = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
    taught = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in rendering.taught:
        taught |= (starts < stop) & (stops > start)
    return Said(where, ids, taught)
