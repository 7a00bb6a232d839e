"""Fenced code blocks of a markdown page, with what the page says about each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_NOTE = re.compile(r"<!--\s*(not run|slow):\s*(.+?)\s*-->")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """At which its text begins, from 1."""
    language: str
    """The first word after the fence; empty for none."""
    text: str
    title: str | None
    """`title="..."`: the file that the text is, relative to the folder that the page's commands run in."""
    not_run: str | None
    """Why it is not run, from a comment `<!-- not run: ... -->` above it."""
    slow: str | None
    """Why it is run by `make test-slow` only, from a comment `<!-- slow: ... -->` above it."""

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order, those inside of lists, notes and tabs too."""
    return list(_found(page, page.read_text(encoding="utf-8"), first_line=1))


def _found(page: Path, text: str, first_line: int) -> Iterator[Block]:
    note: re.Match[str] | None = None
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            note = _NOTE.search(token.content)
        elif token.type == "fence":
            yield _block(page, token, note, first_line)
            note = None


def _block(page: Path, token: Token, note: re.Match[str] | None, first_line: int) -> Block:
    assert token.map is not None
    language, _, rest = token.info.strip().partition(" ")
    title = _TITLE.search(rest)
    return Block(
        page=page,
        line=first_line + token.map[0] + 1,
        language=language,
        text=token.content,
        title=title[1] if title else None,
        not_run=note[2] if note and note[1] == "not run" else None,
        slow=note[2] if note and note[1] == "slow" else None,
    )
