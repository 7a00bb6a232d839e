"""Text of tokens and of models, as pages show it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def visible(token: str) -> str:
    """Give a token's text with white space that can be seen."""
    return token.replace("\n", "\u23ce") if token.strip(" ") else token.replace(" ", "\u2423")


def told(text: str) -> str:
    """Give a model's text with its runs of line ends counted: weak models write little else, and would fill a page.

    Text of nothing but white space is made visible whole.
    """
    if not text.strip() and "\n\n\n" not in text:
        return text.replace("\n", "\u23ce").replace(" ", "\u2423").replace("\t", "\u21e5")
    return re.sub(r"\n{3,}", lambda run: f"\u23ce \u00d7 {len(run[0])}\n", text)


FILTERS: Mapping[str, Callable[[str], str]] = {"visible": visible, "told": told}
"""By their names in templates."""
