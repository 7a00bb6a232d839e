"""The options by which commands name a running service and the key that they show it."""

from __future__ import annotations

import argparse

DEFAULT_URL = "http://127.0.0.1:8700"


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--url` and `--api-key-env`."""
    parser.add_argument("--url", default=DEFAULT_URL, help="the service (default: %(default)s)")
    add_key_option(parser)


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """Declare `--api-key-env`, which `key_of` reads."""
    # A variable and not the key: command lines are in every list of processes.
    parser.add_argument(
        "--api-key-env", metavar="VAR", help="variable that holds the API key (default: POTSTILL_API_KEY)"
    )


def key_of(args: argparse.Namespace) -> str | None:
    """Read the API key that the options name; None makes the client take that of `POTSTILL_API_KEY`.

    Raises:
        InvalidInput: the variable is not set, or empty.
    """
    from potstill.clients.address import key_in

    return key_in(args.api_key_env, "--api-key-env")
