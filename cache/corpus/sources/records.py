"""From a record's value to a document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.sources.documents import BadRecord, Conversation, Document, Field, Ids, Messages, Text

_NAMES = {"text": "text", "ids": "list of token ids", "messages": "list of messages"}
_SHOWN, _NAMED = 40, 20  # characters of a value, and keys


def document(value: Any, field: Field, where: str, record: Mapping[str, Any] | None = None) -> Document:
    """Make a document of the value under the field, which is as JSON gives it, or an array for token ids.

    A text keeps `record`, all fields, where the field asks for them.

    Raises:
        BadRecord: it is null or something else.
    """
    if value is None:
        raise BadRecord(f"{where} has no {_NAMES[field.kind]} under {field.name!r}")
    if field.kind == "text" and isinstance(value, str):
        return Text(where, (encodable(value, where),), record if field.whole else None)
    if field.kind == "ids" and (ids := _ids(value)) is not None:
        return Ids(where, (ids,))
    if field.kind == "messages" and isinstance(value, list):
        return Conversation(where, messages(value, where))
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    hint = f"; --messages-field {field.name} reads it" if field.kind == "text" and _is_messages(value) else ""
    raise BadRecord(f"{where} has {shown} under {field.name!r}, which is no {_NAMES[field.kind]}{hint}")


def others(names: Iterable[str], field: Field) -> str:
    """Say which keys or columns there are in place of the field's, and how to name one."""
    names = list(names)
    own = (field.option, "text" if field.kind == "text" else "")
    hints = [own, ("--messages-field", "messages"), ("--ids-field", "input_ids")]
    hint = next((f"{option} {name}" for option, name in hints if name in names), field.option)
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"it has {shown or 'none'}: name one with {hint}"


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def _ids(value: Any) -> NDArray[np.integer[Any]] | None:
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "iu" and value.ndim == 1 else None
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        return None
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        return None


def messages(value: list[Any], where: str) -> Messages:
    """Check a list of messages.

    Raises:
        BadRecord: it is empty, or a message has no role or a text that cannot be UTF-8.
    """
    for number, message in enumerate(value):
        if isinstance(message, dict) and "from" in message and "value" in message:
            raise BadRecord(f"{where} has messages with from and value in place of role and content")
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"{where} has no role in message {number}; a message has role and content")
        for text in texts_in(message):
            encodable(text, where)
    if not value:
        raise BadRecord(f"{where} has no message")
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a value of JSON, the keys of objects among them."""
    if isinstance(value, str):
        yield value
    inner = chain(*value.items()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from texts_in(each)


def encodable(text: str, where: str) -> str:
    """Return the text if it can be UTF-8: JSON can spell half a surrogate pair, which is no character.

    Raises:
        BadRecord: it cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where} has half a surrogate pair at character {error.start}") from error
    return text


def without_nulls(message: Any) -> Any:
    """Leave out what Arrow fills in where one message has a key that another lacks."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}
