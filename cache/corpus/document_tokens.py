"""From documents to token ids: text and conversations through the tokenizer, ids as they are; and what frames them.

Shape legend:  T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.chat_template import ASSISTANT, ChatTemplate, Rendering
from potstill.cache.corpus.control_tokens import ControlTokens, Disguised
from potstill.cache.corpus.conversations import ConversationTokens, Said, require_bounded, said_in_texts
from potstill.cache.corpus.framing import Frame
from potstill.cache.corpus.plan import Found, IngestPlan
from potstill.cache.corpus.sources import (
    BadRecords,
    Completion,
    Conversation,
    Document,
    Ids,
    SourceFile,
    Text,
    documents,
)
from potstill.cache.corpus.sources.documents import BadRecord, Messages
from potstill.cache.corpus.tokenization import encode_documents
from potstill.cache.corpus.tokenizer import num_ids
from potstill.cache.corpus.tokenizer_files import SpecialTokens, named_tokens
from potstill.cache.errors import InvalidInput
from potstill.cache.types import Tokens


@dataclass(frozen=True, slots=True)
class DocumentIds:
    """A document's token ids, in blocks that are read before the next document is asked for."""

    where: str
    """File and record."""
    blocks: Iterable[Tokens]
    taught: NDArray[np.bool_] | None = None
    """Bool [T] which targets are to be learnt, target t being of the token after token t; None for all."""
    written: Completion | None = None
    """The completion that it is of."""


class DocumentTokens:
    """Makes token ids of files' documents as a plan says, and counts in `found` what it comes across.

    Raises:
        InvalidInput: the tokenizer's files lack what the plan needs: a token that begins or ends texts, or a template;
            or its control tokens cannot be told from text.
    """

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, str], plan: IngestPlan, found: Found) -> None:
        """Take the parts; `files` are the texts of the files beside the tokenizer, by name."""
        special = SpecialTokens.of(files, tokenizer)
        self._plan = plan
        self._found = found
        self._vocab_size = num_ids(tokenizer)
        self._eos = special.eos
        self._frame = Frame(special, found, prepend_bos=plan.prepend_bos, append_eos=plan.append_eos)
        self._control = ControlTokens(tokenizer)
        disguised = None if plan.special_tokens == "keep" else Disguised(tokenizer, self._control)
        self._of_text = tokenizer if disguised is None else disguised.tokenizer
        self._conversations = None
        if plan.field.kind == "messages" or plan.completions == "chat":
            template = _template(special, files, "--completions chat" if plan.completions else "--messages-field")
            self._conversations = ConversationTokens(tokenizer, template, self._control, disguised, self._see)

    def of_file(self, file: SourceFile) -> Iterator[DocumentIds]:
        """Yield the token ids of each document of a file.

        Raises:
            InvalidInput: the file or a record is bad, or has an id that the tokenizer does not have; or a control
                token is refused.
        """
        bad = BadRecords(skip=self._plan.skip_bad)
        found = documents(file, self._plan.field, bad, vocab_size=self._vocab_size, eos=self._eos)
        if self._plan.completions is not None:
            yield from self._of_completions(found, bad)
        elif self._conversations is not None:
            yield from self._of_conversations(found, self._conversations, bad)
        elif self._plan.field.kind == "text" and file.kind != "tokens":
            yield from self._of_texts(found, file, bad)
        else:
            for document in found:
                yield DocumentIds(document.where, self._frame.around(self._checked(document)))
        self._found.bad_records += bad.count
        self._found.first_bad = self._found.first_bad or bad.first

    def _of_texts(self, found: Iterator[Document], file: SourceFile, bad: BadRecords) -> Iterator[DocumentIds]:
        places: deque[str] = deque()  # of documents that are read, and not yet tokenized

        def texts() -> Iterator[Iterator[str]]:
            for document in found:
                assert isinstance(document, Text)
                if self._accepted(document, bad):
                    places.append(document.where)
                    yield self._watched(document)

        for blocks in encode_documents(self._of_text, texts(), str(file.path)):
            yield DocumentIds(places.popleft(), self._frame.around(blocks))

    def _of_conversations(
        self, found: Iterator[Document], tokens: ConversationTokens, bad: BadRecords
    ) -> Iterator[DocumentIds]:
        for said in tokens.said(self._with_roles(found), bad):
            yield self._framed(said)

    def _framed(self, said: Said, written: Completion | None = None) -> DocumentIds:
        front, back = self._frame.ends(said.ids)
        ids = np.concatenate([front, said.ids, back])
        taught = np.zeros(len(ids), np.bool_)
        # On the axis of targets: that of a token is the one before it.
        taught[max(0, len(front) - 1) : len(front) + len(said.ids) - 1] = said.taught[0 if len(front) else 1 :]
        # An answer that its template ends with no token is to end all the same.
        taught[len(ids) - 2 : len(ids) - 1] |= bool(len(back) and said.taught[-1])
        return DocumentIds(said.where, (ids,), taught, written)

    def _of_completions(self, found: Iterator[Document], bad: BadRecords) -> Iterator[DocumentIds]:
        read: deque[Completion] = deque()  # completions that are read, and not yet tokenized

        def completions() -> Iterator[Completion]:
            for document in found:
                assert isinstance(document, Completion)
                read.append(document)
                yield document

        if self._conversations is not None:
            said = self._conversations.said(_as_talks(completions(), bad), bad)
        else:
            said = said_in_texts(self._of_text, self._as_texts(completions(), bad))
        for each in said:
            while (written := read.popleft()).where != each.where:
                pass  # it was refused
            if self._plan.completions in ("context", "chat"):
                yield self._framed(each, written)
            else:
                yield DocumentIds(each.where, self._frame.around((each.ids,)), None, written)

    def _as_texts(self, completions: Iterator[Completion], bad: BadRecords) -> Iterator[tuple[str, Rendering]]:
        """Give the text of each with the span that the model wrote."""
        for each in completions:
            try:
                before = "" if self._plan.completions == "alone" else _before(each)
                rendering = Rendering(before + each.text, ((len(before), len(before) + len(each.text)),))
                require_bounded(rendering, each.where)
                for name, at in self._control.found(rendering.text):
                    self._see(each.where, name, at)
            except BadRecord as error:
                bad.add(str(error))
            else:
                yield each.where, rendering

    def _with_roles(self, found: Iterator[Document]) -> Iterator[Conversation]:
        for document in found:
            assert isinstance(document, Conversation)
            self._found.roles.update(message["role"] for message in document.messages)
            yield document

    def _see(self, where: str, name: str, at: int) -> None:
        """Count a control token.

        Raises:
            BadRecord: it is refused.
        """
        if self._plan.special_tokens == "refuse":
            raise BadRecord(
                f"{where} has the control token {name!r} at character {at}, which --special-tokens split takes as text"
            )
        self._found.control_tokens[name] += 1

    def _accepted(self, document: Text, bad: BadRecords) -> bool:
        """Tell whether a record's text may stay; a text file is read only once, and may so far."""
        if self._plan.special_tokens == "refuse" and isinstance(document.pieces, tuple):
            try:
                for name, at in self._control.found("".join(document.pieces)):
                    self._see(document.where, name, at)
            except BadRecord as error:
                bad.add(str(error))
                return False
        return True

    def _watched(self, document: Text) -> Iterator[str]:
        try:
            yield from self._control.seen(document.pieces, lambda name, at: self._see(document.where, name, at))
        except BadRecord as error:
            raise InvalidInput(f"{error}; take it out") from error

    def _checked(self, document: Document) -> Iterator[Tokens]:
        assert isinstance(document, Ids)
        for block in document.blocks:
            if len(block) and (block.max() >= self._vocab_size or block.min() < 0):
                raise _unknown_id(document.where, block, self._vocab_size)
            yield block.astype(np.uint32, copy=False)


def _as_talks(completions: Iterator[Completion], bad: BadRecords) -> Iterator[Conversation]:
    """Give each as a conversation that ends with what the model wrote."""
    for each in completions:
        try:
            prompt = _require_prompt(each)
        except BadRecord as error:
            bad.add(str(error))
            continue
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        yield Conversation(each.where, [*asked, {"role": ASSISTANT, "content": each.text}], last_only=True)


def _require_prompt(written: Completion) -> str | Messages:
    if written.prompt is None:
        raise BadRecord(f"{written.where} has no 'prompt' or 'messages': --completions alone takes records without")
    return written.prompt


def _before(written: Completion) -> str:
    """The text of a prompt, with a blank line behind it where there is no white space on either side.

    Raises:
        BadRecord: there is none, or a message of it has something else than text.
    """
    prompt = _require_prompt(written)
    if not isinstance(prompt, str):
        prompt = "\n\n".join(_content(message, number, written.where) for number, message in enumerate(prompt))
    apart = not prompt or prompt[-1].isspace() or written.text[:1].isspace()
    return prompt if apart else f"{prompt}\n\n"


def _content(message: Mapping[str, Any], number: int, where: str) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord(f"{where} has a prompt whose message {number} is not all text; take out what is not")
    return "".join(map(str, texts))


def _template(special: SpecialTokens, files: Mapping[str, str], option: str) -> ChatTemplate:
    if special.chat_template is None:
        raise InvalidInput(
            f"{option} needs a chat template, and there is none beside the tokenizer; put one into "
            "chat_template.jinja in its folder"
        )
    return ChatTemplate(special.chat_template, named_tokens(files))


def _unknown_id(where: str, block: NDArray[Any], vocab_size: int) -> InvalidInput:
    wrong = block[(block >= vocab_size) | (block < 0)][0]
    if wrong < 0:
        return InvalidInput(
            f"{where} has the token id {wrong}, below 0: is that column of labels? name one of ids with --ids-field"
        )
    return InvalidInput(
        f"{where} has the token id {wrong}, the tokenizer's ids end at {vocab_size - 1}; "
        "give the tokenizer that made it"
    )
