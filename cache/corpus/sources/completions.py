"""From records of what models wrote to documents: flat ones, and logs of requests and answers in OpenAI's shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from potstill.cache.corpus.sources.documents import BadRecord, Completion, Field, Messages
from potstill.cache.corpus.sources.records import encodable, messages, without_nulls

_LATEST = 1 << 33  # seconds since 1970: in the year 2242, so that milliseconds are none
_LONGEST_MODEL = 256  # characters
_TEXTS = ("completion", "response")
_PROMPTS = ("messages", "prompt")


def completion(record: Any, field: Field, where: str) -> Completion:
    """Make a document of a record, with the field's model and time where it has none.

    Raises:
        BadRecord: it has no completion, model or time, or one that is none.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"{where} is no object with a prompt and a completion")
    request = _inside(record, "request") or _inside(record, "body") or record
    response = _inside(record, "response") or record
    return Completion(
        where,
        _prompt(request, where),
        _text(response, where),
        _model(response.get("model") or request.get("model") or field.written_by, where),
        _time(response.get("created") or record.get("created") or field.written_at, where),
    )


def seconds(value: Any) -> int | None:
    """Seconds since 1970 of a time in such seconds, or in ISO 8601 with UTC where it names no zone; None of others."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LATEST
    return int(value) if known else None


def prompt_hash(prompt: str | Messages | None) -> int:
    """The first 8 bytes of a prompt's sha256, as one number: of a text in UTF-8, of messages as JSON; 0 for none."""
    if prompt is None:
        return 0
    if not isinstance(prompt, str):
        # Alike from files that order keys in other ways.
        prompt = json.dumps(prompt, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")


def _inside(record: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The object under a key, without the `body` that files of batches put around it; None where there is none."""
    found = record.get(key)
    if isinstance(found, dict) and isinstance(found.get("body"), dict):
        found = found["body"]
    return found if isinstance(found, dict) else None


def _prompt(request: Mapping[str, Any], where: str) -> str | Messages | None:
    name = next((name for name in _PROMPTS if request.get(name) is not None), None)
    if name is None:
        return None
    prompt = request[name]
    if isinstance(prompt, str):
        return encodable(prompt, where)
    if isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt):
        return [without_nulls(each) for each in messages(prompt, where)]
    raise BadRecord(f"{where} has a prompt under {name!r} that is neither a text nor a list of messages")


def _text(response: Mapping[str, Any], where: str) -> str:
    value: Any = next((response[name] for name in _TEXTS if response.get(name) is not None), None)
    choices = response.get("choices")
    if value is None and isinstance(choices, list):
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise BadRecord(f"{where} has {len(choices)} choices; write a record for each answer that is to be kept")
        value = choices[0].get("message") or choices[0].get("text")
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str) and value:
        return encodable(value, where)
    error = response.get("error")
    told = f" but the error {json.dumps(error)[:80]}" if error else ""
    raise BadRecord(f"{where} has no text under 'completion' or 'response', or in 'choices'{told}")


def _model(value: Any, where: str) -> str:
    if not value:
        raise BadRecord(f"{where} has no 'model': name what wrote it with --written-by NAME")
    # Printed by commands, so that a terminal must not obey it.
    if not isinstance(value, str) or len(value) > _LONGEST_MODEL or not value.isprintable():
        raise BadRecord(f"{where} has a 'model' that is no name of up to {_LONGEST_MODEL} printable characters")
    return value


def _time(value: Any, where: str) -> int:
    if value is None:
        raise BadRecord(f"{where} has no time under 'created': say when it was written with --written-at TIME")
    found = seconds(value)
    if found is None:
        raise BadRecord(
            f"{where} has {str(value)[:40]!r} under 'created', which is no time: give seconds since 1970 or ISO 8601"
        )
    return found
