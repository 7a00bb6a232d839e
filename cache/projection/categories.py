"""Kinds of tokens, by the bytes that they spell."""

from __future__ import annotations

import unicodedata

CATEGORIES = ("words", "digits", "spaces", "punctuation and code", "non-Latin", "special")
WORDS, DIGITS, SPACES, PUNCTUATION, NON_LATIN, SPECIAL = range(len(CATEGORIES))


def category_of(data: bytes) -> int:
    """Tell the category of a token by its bytes: by its letters, without the spaces around them.

    Parts of a character of several bytes are `NON_LATIN`, as most such characters are.
    """
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        return NON_LATIN
    if not text:
        return SPACES
    if any(each.isalpha() and not _is_latin(each) for each in text):
        return NON_LATIN
    if text.isalpha():
        return WORDS
    return DIGITS if text.isdigit() else PUNCTUATION


def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "")
