"""Options by which commands choose the fields to keep, and their encoding."""

from __future__ import annotations

import argparse
from typing import Any

from potstill.cache.errors import InvalidInput
from potstill.cache.fields import FIELDS, Fields, option_of

_ASKED = [field for field in FIELDS if field.is_asked_of_teachers]


def add_field_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fields_of`, and `--encoding`."""
    add_wish_options(parser)
    parser.add_argument("--encoding", default="u8", help="u8, archive, f16 or f32 (default %(default)s)")


def add_wish_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose fields: one for each attribute of `Fields`."""
    for field in _ASKED:
        for name, told in field.attributes.items():
            default = getattr(Fields(), name)
            how: dict[str, Any] = {"type": int, "metavar": "N"}
            if isinstance(default, bool):
                how = {"action": "store_true"}
            elif isinstance(default, tuple):
                how = {"type": _numbers, "metavar": "T,T"}
            parser.add_argument(option_of(name), dest=name, default=default, help=told, **how)


def fields_of(args: argparse.Namespace) -> Fields:
    """Make `Fields` from the options.

    Raises:
        InvalidInput: a number is out of range.
    """
    if args.k < 0:
        raise InvalidInput(f"--top-k is {args.k}; it must be at least 0")
    values = {name: getattr(args, name) for field in _ASKED for name in field.attributes}
    return Fields(**{**values, "seed": args.seed if args.draws else 0})


def field_arguments(args: argparse.Namespace) -> list[str]:
    """Words of a command line that give the same options again; defaults are left out."""
    parser = argparse.ArgumentParser()
    add_field_options(parser)
    words: list[str] = []
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if value == default:
            continue
        words.append(option_of(name))
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 2,4") from None
