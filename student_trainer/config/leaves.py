"""Values of nested JSON by the path to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(value: Any, separator: str = ".") -> Iterator[tuple[str, Any]]:
    """Give `{"a": {"b": 1}}` as the pair `("a.b", 1)`; list items go under their index."""
    for key, item in enumerate(value) if isinstance(value, list) else value.items():
        if isinstance(item, Mapping | list):
            yield from ((f"{key}{separator}{inner}", leaf) for inner, leaf in leaves(item, separator))
        else:
            yield str(key), item
