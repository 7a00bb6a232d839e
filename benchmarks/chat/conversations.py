"""Short conversations on the help topics of the standard library, which are on every machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

Message = dict[str, str]

_WORDS = 28
"""Most words of an answer, so that a slow teacher reads many conversations."""


def conversations(count: int) -> list[list[Message]]:
    """Give `count` conversations in order of topic: a question and its answer, and where there is more, `Go on.`."""
    found = []
    for name in sorted(topics):
        answers = _paragraphs(topics[name])[:2]
        asked = [f"What is {name!r} in Python?", "Go on."]
        talk = []
        for question, answer in zip(asked, answers, strict=False):
            talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if talk:
            found.append(talk)
    return found[:count]


def write_conversations(talks: list[list[Message]], file: Path) -> None:
    """Write a line of JSON for each, with the field `messages`."""
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")


def _paragraphs(topic: str) -> list[str]:
    """Prose of a topic: paragraphs that are no heading, list, code or grammar, cut after `_WORDS` words."""
    whole = [" ".join(part.split()) for part in re.split(r"\n{2,}", topic) if re.match(r"[A-Z]", part)]
    prose = [text for text in whole if text.endswith((".", ":")) and "***" not in text and "===" not in text]
    return [" ".join(text.split()[:_WORDS]) for text in prose]
