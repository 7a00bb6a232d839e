"""Reading of files that a person named, as text, TOML or JSON; errors say in one line which and what is wrong."""

from __future__ import annotations

import json
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


def require_folder_of(file: str | Path, option: str) -> None:
    """Check, before long work, that the folder of a file which is to be written is there.

    Raises:
        InvalidInput: it is not; the line names the option that gave the file.
    """
    folder = Path(file).parent
    if not folder.is_dir():
        raise InvalidInput(f"{option} {str(file)!r} cannot be written: there is no folder {str(folder)!r}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InvalidInput: it does not exist, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_named(path))
    except (ValueError, RecursionError) as error:  # the latter by brackets within brackets; also numbers too long
        raise InvalidInput(f"{path}: not TOML: {error}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model's folder; errors name the two alone, as they may go to other machines.

    Raises:
        InvalidInput: it cannot be read, or is none.
    """
    where = f"{file.parent.name}/{file.name}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{where} cannot be read: {error.strerror or error}") from error
    return json_object(data, where)


def read_json_records(path: Path) -> list[Any]:
    """Read the values of a list, of JSON lines, or the one value of a file.

    Raises:
        InvalidInput: it does not exist, cannot be read, or is not JSON.
    """
    text = read_named(path)
    begin = text.lstrip()
    if not begin:
        return []
    try:
        found, end = json.JSONDecoder().raw_decode(begin)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if begin[end:].strip():
        # Not by `splitlines`, which parts lines at marks such as U+2028 that JSON texts may hold.
        lines = enumerate(text.split("\n"), 1)
        return [_value(line, f"{path}:{number}") for number, line in lines if line.strip()]
    return found if isinstance(found, list) else [found]


def json_object(data: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, which errors call `where`.

    Raises:
        InvalidInput: it is none.
    """
    value = _value(data, where)
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} is not a JSON object; mend it, or take it away")
    return value


def _value(data: str | bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}") from error
