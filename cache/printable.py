"""Text of others, made harmless for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape what a terminal obeys or hides, like `\x1b`: all that does not print, but for the ends of lines."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def _escape(char: str) -> str:
    return repr(char)[1:-1]
