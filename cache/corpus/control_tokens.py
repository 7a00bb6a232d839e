"""Control tokens that stand in text: found, and kept apart from those that a template puts in.

A tokenizer reads `<eos>` in a text as the control token. Whoever writes text could end documents with it, or speak
as the system in a conversation. `Disguised` is the tokenizer with other names for its control tokens, which no text
has: so all text is text, and where a control token is meant, it is called by its other name.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from potstill.cache.errors import InvalidInput


class ControlTokens:
    """The control tokens of a tokenizer, those that it lists as special."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        self.names = sorted({token.content for token in added if token.special and token.content})
        self._pattern = any_of(self.names)
        self._longest = max(map(len, self.names), default=1)

    def seen(self, pieces: Iterable[str], see: Callable[[str, int], None]) -> Iterator[str]:
        """Hand on the pieces of a text; `see` is told each control token in it, and at what character."""
        rest, before = "", 0
        for piece in pieces:
            text = rest + piece
            # One that begins later may go on in the next piece.
            sure, at = len(text) - self._longest + 1, 0
            for match in self._pattern.finditer(text):
                if match.start() >= sure:
                    break
                see(match[0], before + match.start())
                at = match.end()
            cut = max(at, sure, 0)
            rest, before = text[cut:], before + cut
            yield piece
        for name, at in self.found(rest):
            see(name, before + at)

    def found(self, text: str) -> Iterator[tuple[str, int]]:
        """Yield each control token in a text, and at what character it begins."""
        return ((match[0], match.start()) for match in self._pattern.finditer(text))

    def ends(self, text: str, start: int, stop: int) -> list[int]:
        """The character behind each control token in part of a text."""
        return [match.end() for match in self._pattern.finditer(text, start, stop)]

    def replaced(self, text: str, names: Callable[[str], str]) -> str:
        """Replace each control token in a text."""
        return self._pattern.sub(lambda match: names(match[0]), text)


class Disguised:
    """A tokenizer whose control tokens have names that stand in no text.

    Raises:
        InvalidInput: its model makes control tokens of other tokens.
    """

    def __init__(self, tokenizer: Tokenizer, control: ControlTokens) -> None:
        self.names = other_names(control.names)
        self.tokenizer = self._renamed(tokenizer) if self.names else tokenizer

    def _renamed(self, tokenizer: Tokenizer) -> Tokenizer:
        parts: dict[str, Any] = json.loads(tokenizer.to_str())
        parts["post_processor"] = None  # it may name control tokens, and is not used
        for token in parts["added_tokens"]:
            if token["special"]:
                token["content"] = self._other(token["content"])
        model = parts["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._other(piece): token_id for piece, token_id in model["vocab"].items()}
        else:  # pieces with scores, whose ids are their places
            model["vocab"] = [[self._other(piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._other(model["unk_token"])
        try:
            renamed = Tokenizer.from_str(json.dumps(parts))
        except Exception as error:  # tokenizers raises nothing narrower
            raise _made_of_others(str(error)) from error
        for name, other in self.names.items():
            if renamed.token_to_id(other) != tokenizer.token_to_id(name):
                raise _made_of_others(name)
        return renamed

    def _other(self, name: str) -> str:
        return self.names.get(name, name)


def _made_of_others(what: str) -> InvalidInput:
    return InvalidInput(
        f"the tokenizer's control tokens cannot be told from its text ({what}); say --special-tokens keep"
    )


def other_names(names: Iterable[str]) -> dict[str, str]:
    """Other names by name, which stand in no text and are equally long."""
    nonce = secrets.token_hex(8)
    return {name: f"{nonce}{number:06x}" for number, name in enumerate(names)}


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern of any of some names; of two that begin alike, the longer."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def in_words(counts: Counter[str], most: int = 3) -> str:
    """The commonest control tokens with their counts, and how many others."""
    some = ", ".join(f"{count} {name}" for name, count in counts.most_common(most))
    others = counts.total() - sum(count for _, count in counts.most_common(most))
    return f"{some} and {others} others" if others else some
