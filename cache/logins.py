"""Users and passwords in URLs, of which either may be an API key: what is shown or logged has none."""

from __future__ import annotations

import re

# In a URL anything before its last @; else `user:password@` where a word may begin, of a URL that lacks its scheme.
_LOGIN = re.compile(r"""(?<=//)[^\s'"]*@|(?<![^\s'"=(])[^\s'"@:/=(]*:(?!//)[^\s'"@]+@(?=[^\s'"@])""")


def without_login(text: str) -> str:
    """The text without the logins of any URLs in it."""
    return _LOGIN.sub("", text)
