"""Running `potstill` in this process."""

from __future__ import annotations

import pytest

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
