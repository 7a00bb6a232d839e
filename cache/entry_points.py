"""Look-up of commands and teacher factories by name, so that packages need not import each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from potstill.cache.errors import InvalidInput
from potstill.cache.types import JSON, Teacher


class Command(Protocol):
    """Interface of a module under the entry points `potstill.commands`."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command, and return the exit status of the process."""


class TeacherFactory(Protocol):
    """Interface of the entry points `potstill.teachers`: opens the teacher that a model name, path or URL means."""

    def __call__(self, spec: str, *, options: Mapping[str, JSON] | None = None) -> AbstractAsyncContextManager[Teacher]:
        """Open the teacher `spec`; `options` are the factory's own, by name."""


def command_entry_points() -> dict[str, EntryPoint]:
    """Entry points of all commands, by name; loading one gives its `Command` module."""
    return {point.name: point for point in sorted(_points("potstill.commands"), key=lambda p: p.name)}


def _points(group: str) -> tuple[EntryPoint, ...]:
    return _points_of(group, tuple(sys.path))


@cache
def _points_of(group: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Reads the metadata of every package on the path, which takes 30 ms where there are many.
    return tuple(entry_points(group=group))


def name_and_model(text: str, option: str = "--teacher") -> tuple[str, str]:
    """Part `NAME=MODEL`, the value of a command-line option.

    Raises:
        InvalidInput: there is no `=`, or one side of it is empty.
    """
    name, _, model = text.partition("=")
    if not (name and model):
        raise InvalidInput(f"{option} {text!r}: write NAME=MODEL_OR_URL, like smol=HuggingFaceTB/SmolLM2-135M")
    return name, model


def open_teacher(spec: str, *, options: Mapping[str, JSON] | None = None) -> AbstractAsyncContextManager[Teacher]:
    """Open the teacher that `spec` means: a running service (`http://...`), or a path or model name, with vLLM.

    Raises:
        InvalidInput: there is no factory for the URL scheme.
        PotstillError: whatever the factory raises on entering.
    """
    scheme = spec.split("://", 1)[0] if "://" in spec else "vllm"
    factories = {point.name: point for point in _points("potstill.teachers")}
    if scheme not in factories:
        known = ", ".join(sorted(factories))
        raise InvalidInput(f"no teacher for {spec!r}: scheme {scheme!r} is unknown, known are {known}")
    return cast("TeacherFactory", factories[scheme].load())(spec, options=options)
