"""Words of the harness beside its results: warnings are kept as notes, its progress bars are left out."""

from __future__ import annotations

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TextIO

from potstill.cache.errors import InvalidInput, PotstillError

_MOST = 240
"""Characters of a warning; some quote a whole question."""


@dataclass(eq=False)
class Warnings:
    """The first warning of each place in the harness's code, and how many there were."""

    first: dict[tuple[str, int], str] = field(default_factory=dict)
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, record: logging.LogRecord) -> None:
        """Count a warning."""
        place = record.pathname, record.lineno
        self.first.setdefault(place, " ".join(record.getMessage().split())[:_MOST])
        self.counts[place] += 1

    def texts(self) -> list[str]:
        """One line for each place."""
        return [
            f"lm_eval: {text}" + (f" (and {self.counts[place] - 1:,} more)" if self.counts[place] > 1 else "")
            for place, text in self.first.items()
        ]


@contextmanager
def quiet(warnings: Warnings) -> Iterator[None]:
    """Keep what the harness warns of within the block, leave out its bars, and take what it prints to stderr."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = warnings.add  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval")
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    shown = WithoutBars(sys.stderr)
    try:
        # Tasks print as they like, and stdout is for the answer.
        with redirect_stdout(shown), redirect_stderr(shown):
            yield
    finally:
        logger.propagate = propagated
        logger.removeHandler(handler)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Make one line of an error; a task's own templates, data and functions may raise anything."""
    try:
        yield
    except PotstillError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InvalidInput(f"{what}: {type(error).__name__}: {lines[0]}") from error


class WithoutBars(io.TextIOBase):
    """A stream that leaves out the bars of tqdm, which begin each with a carriage return and end in a line break."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_bar = False

    def write(self, text: str) -> int:
        """Write text that is no part of a bar."""
        if text.startswith("\r") or (self._in_bar and text in ("", "\n")):
            self._in_bar = text != "\n"
        else:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
