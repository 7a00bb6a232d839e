"""The options that commands give to the teachers they open: `--option [NAME.]KEY=VALUE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from potstill.cache.errors import InvalidInput
from potstill.cache.logins import without_login
from potstill.cache.types import JSON


def add_teacher_options(parser: argparse._ActionsContainer) -> None:
    """Declare `--option`."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="[NAME.]KEY=VALUE",
        help="of the teachers that run in this process, like prefix_ids=[1] or dtype=bfloat16; with NAME. of that one "
        "only; may be given again",
    )


def key_and_value(text: str) -> tuple[str, JSON]:
    """Part `KEY=VALUE`; a value that is no JSON is a string without its quotes.

    Raises:
        InvalidInput: there is no `=`, or nothing before it.
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InvalidInput(f"--option {text!r}: write KEY=VALUE, like max_top_k=128")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def teacher_options(texts: Sequence[str], teachers: Sequence[tuple[str, str]]) -> dict[str, dict[str, JSON]]:
    """Sort the options by the name of the teacher; those without a name are of every one.

    Args:
        texts: values of `--option`. One with a name goes before one without.
        teachers: names, and the model or URL of each.

    Raises:
        InvalidInput: an option that cannot be read, of a teacher that is not opened, or of a running service.
    """
    models = dict(teachers)
    common: dict[str, JSON] = {}
    named: dict[str, dict[str, JSON]] = {name: {} for name in models}
    for text in texts:
        key, value = key_and_value(text)
        # A teacher's name may have dots, the key of an option has none.
        name, dot, key = key.rpartition(".")
        if dot and name not in models:
            raise InvalidInput(
                f"--option {text!r} is of teacher {name!r}; those of this command are {', '.join(models)}"
            )
        for each in [name] if dot else models:
            if "://" in models[each]:
                raise InvalidInput(
                    f"--option {text!r}: teacher {each!r} is a running service, {without_login(models[each])}, which "
                    "takes none; set it in that service's file, or write NAME.KEY=VALUE for another teacher"
                )
        (named[name] if dot else common)[key] = value
    return {name: {**common, **own} for name, own in named.items()}
