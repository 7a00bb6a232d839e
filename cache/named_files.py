"""Reading of text files that a person named; errors say in one line which file and what is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from potstill.cache.errors import InvalidInput


def read_named(path: str | Path) -> str:
    """Read a UTF-8 file.

    Raises:
        InvalidInput: it does not exist, or cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no file {str(path)!r}") from error
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InvalidInput: it does not exist, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_named(path))
    except (ValueError, RecursionError) as error:  # the latter by brackets within brackets; also numbers too long
        raise InvalidInput(f"{path}: not TOML: {error}") from error
