"""Removal of users and passwords, either of which may be an API key, from URLs that are shown or logged."""

from __future__ import annotations

import re
from collections.abc import Iterator

# All of a word from its first //, or a word's begin like that of `curl user:password@host`, without a scheme.
# Texts of callers come here: a match takes all that it has looked at (`*+`), so that no character is looked at twice.
_MAY_HAVE_LOGIN = re.compile(r"""//[^\s'"]*+|(?<![^\s'"=(])[^\s'"@:/=(]*+:(?!//)[^\s'"@]++@?""")


def without_login(text: str) -> str:
    """Remove the logins of all URLs in a text, in time linear in its length."""
    return "".join(pieces_without_login(text))


def pieces_without_login(text: str) -> Iterator[str]:
    """Yield the text without logins piece by piece, for those who need only its begin."""
    at = 0
    for found in _MAY_HAVE_LOGIN.finditer(text):
        yield text[at : found.start()]
        yield _shown(found)
        at = found.end()
    yield text[at:]


def _shown(found: re.Match[str]) -> str:
    login, at, rest = found[0].rpartition("@")
    if not at:
        return rest
    return f"//{rest}" if login.startswith("//") else rest
