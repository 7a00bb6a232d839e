"""Conversations as text, by a tokenizer's chat template, and which of its parts are the assistant's.

The template is Jinja source that came with a model: it runs in Jinja's immutable sandbox, with what `transformers`
gives it beside.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from potstill.cache.corpus.sources.documents import BadRecord
from potstill.cache.errors import InvalidInput

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
"""Role of the messages that are learnt."""
# What code of a template may raise on messages that it was not written for.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation's text, and the spans [start, stop) in characters that are the assistant's."""

    text: str
    taught: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A compiled template.

    Raises:
        InvalidInput: it is no template.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        """Compile; `names` has the tokens that templates name, such as `bos_token`."""
        self._names = dict(names)
        self._tagged = _TAG.search(source) is not None
        environment = _environment()
        nonce = secrets.token_hex(16)
        self._marks = re.compile(f"{nonce}([<>])")
        environment.globals["_generation_mark"] = lambda side: f"{nonce}{side}"
        try:
            self._template = environment.from_string(source)
        except (*_FAILURES, SyntaxError) as error:  # Jinja makes Python of it, and works constants out
            raise InvalidInput(f"the tokenizer's chat template is no Jinja: {_told(error)}; mend its files") from error

    def render(self, messages: Sequence[Mapping[str, Any]], where: str) -> Rendering:
        """Write a conversation.

        The assistant's parts are what the template has in `{% generation %}`. Where it has none, they are what a
        conversation up to an assistant's message has more than the one before it with the prompt to generate.

        Raises:
            BadRecord: the template refuses the conversation, or writes a message otherwise when others follow.
        """
        text = self._text(messages, where)
        return self._unmarked(text, where) if self._tagged else self._by_difference(text, messages, where)

    def _text(self, messages: Sequence[Mapping[str, Any]], where: str, *, prompt: bool = False) -> str:
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._template.render(**self._names, **given)
        except _FAILURES as error:
            raise BadRecord(f"{where} is refused by the chat template: {_told(error)}{_no_text(messages)}") from error

    def _unmarked(self, text: str, where: str) -> Rendering:
        parts, spans, begun, at, length = [], [], 0, 0, 0
        sides = "".join(match[1] for match in self._marks.finditer(text))
        if sides.replace("<>", ""):  # as of a tag that is left by a break
            raise BadRecord(f"{where}: the chat template begins and ends {{% generation %}} not in turn")
        for match in self._marks.finditer(text):
            parts.append(text[at : match.start()])
            length += len(parts[-1])
            at = match.end()
            if match[1] == "<":
                begun = length
            else:
                spans.append((begun, length))
        return Rendering("".join([*parts, text[at:]]), tuple(spans))

    def _by_difference(self, text: str, messages: Sequence[Mapping[str, Any]], where: str) -> Rendering:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._text(messages[:number], where, prompt=True)
            up_to = text if number + 1 == len(messages) else self._text(messages[: number + 1], where)
            if not (text.startswith(before) and text.startswith(up_to) and len(before) <= len(up_to)):
                raise BadRecord(
                    f"{where}: the chat template writes message {number} in another way alone than among the others, "
                    "which hides where the assistant's part is; put {% generation %} around that in the template"
                )
            spans.append((len(before), len(up_to)))
        return Rendering(text, tuple(spans))


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _no_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Name the first message whose content is no text, the likely cause of what a template's code raises."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) and "tool_calls" not in message:
            shown = "null" if content is None else "a list" if isinstance(content, list) else "no text"
            return f" (the content of message {number} is {shown}; make it text)"
    return ""


class _Generation(Extension):
    """Puts marks around what stands in `{% generation %}`; `transformers` has the same tag."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the tag up to its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # What the body sets is its own, as where `transformers` makes a macro of it.
        return [self._mark("<", line), nodes.Scope(body), self._mark(">", line)]

    def _mark(self, side: str, line: int) -> nodes.Node:
        call = nodes.Call(nodes.Name("_generation_mark", "load"), [nodes.Const(side)], [], None, None)
        return nodes.Output([call]).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 -- as templates call it
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Write JSON without what Jinja's own filter escapes for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
