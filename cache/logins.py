"""Removal of users and passwords, either of which may be an API key, from URLs that are shown or logged."""

from __future__ import annotations

import re

# In a URL, all before its last @. Without a scheme (`curl user:password@host`), `user:password@` at a word's start.
_LOGIN = re.compile(r"""(?<=//)[^\s'"]*@|(?<![^\s'"=(])[^\s'"@:/=(]*:(?!//)[^\s'"@]+@(?=[^\s'"@])""")


def without_login(text: str) -> str:
    """Remove the logins of all URLs in a text."""
    return _LOGIN.sub("", text)
