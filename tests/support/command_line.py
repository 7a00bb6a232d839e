"""Running `potstill` in this process."""

from __future__ import annotations

import argparse
import io

import pytest

from potstill.cache.entry_points import Command
from potstill.cache.errors import PotstillError
from potstill.clients.cli import main


def run(*arguments: object) -> int:
    """Its exit status."""
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert run(*arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


class InterruptedStream(io.StringIO):
    """In place of stderr: Ctrl-C is pressed when a line of progress is written to it, as at the end of the work."""

    def write(self, text: str) -> int:
        if "/s, " in text:
            raise KeyboardInterrupt
        return super().write(text)


def run_command(command: Command, *arguments: object) -> int:
    """The exit status of a command's module; its errors are raised."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def refusal(command: Command, *arguments: object) -> str:
    """The error of a command's module that is refused."""
    with pytest.raises(PotstillError) as caught:
        run_command(command, *arguments)
    return caught.value.detail
