"""Reading of the files that run the service elsewhere, with our own parsers and settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from potstill.cache.entry_points import command_entry_points
from potstill.teacher_service.settings.service import ServiceSettings, load_settings
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"


def parsed(argv: list[str]) -> argparse.Namespace:
    """What our own command makes of a command line; wrong usage leaves by SystemExit."""
    command = command_entry_points()[argv[0]].load()
    parser = argparse.ArgumentParser(prog=argv[0], allow_abbrev=False)
    command.add_arguments(parser)
    return parser.parse_args(argv[1:])


def settings_of(path: Path) -> ServiceSettings:
    return load_settings(path, command_line={}, environment={})
