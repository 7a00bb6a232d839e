"""The options by which commands say what to keep of each position, and how."""

from __future__ import annotations

import argparse

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Fields


def add_field_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fields_of`, and `--encoding`."""
    parser.add_argument("--top-k", type=int, default=64, help="entries kept a position, 0 for none (default 64)")
    parser.add_argument("--draws", type=int, default=0, metavar="N", help="draws with replacement a position")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--entropy", action="store_true", help="keep the entropy of each position")
    parser.add_argument(
        "--temperatures", type=_numbers, default=(), metavar="T,T", help="keep log sum p**(1/T) of each T"
    )
    parser.add_argument("--dense", action="store_true", help="keep all logprobs: for small evaluation splits")
    parser.add_argument("--encoding", default="u8", help="u8, archive, f16 or f32 (default %(default)s)")


def fields_of(args: argparse.Namespace) -> Fields:
    """The fields that the options ask for.

    Raises:
        InvalidInput: a number that no field can have.
    """
    if args.top_k < 0:
        raise InvalidInput(f"--top-k is {args.top_k}; it must be at least 0")
    return Fields(
        k=args.top_k,
        draws=args.draws,
        seed=args.seed if args.draws else 0,
        entropy=args.entropy,
        temperatures=args.temperatures,
        dense=args.dense,
    )


def field_arguments(args: argparse.Namespace) -> list[str]:
    """The words of a command line that give the same options again; what has its default is left out."""
    parser = argparse.ArgumentParser()
    add_field_options(parser)
    words: list[str] = []
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if value == default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 2,4") from None
