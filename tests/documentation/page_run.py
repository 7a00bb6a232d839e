"""Running the blocks of one page in a scratch folder, as somebody would who types them one after the other."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from potstill.cache.text.rules import FilterPlan
from potstill.clients.cli import main
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.config import TrainConfig
from potstill.teacher_service.settings.service import ServiceSettings
from tests.documentation.blocks import Block
from tests.documentation.potstill_with_fakes import fakes_in_place_of_vllm, serve_with_fakes
from tests.support.paths import ROOT
from tests.support.processes.forked import Forked

_LAST_LINES = 30
_STOP_SECONDS = 60.0
_SHELL = re.compile(r"[|&;<>$`~*]")
"""What only a shell understands."""


class PageRun:
    """One page's folder, environment and running services. A context manager: leaving stops what the page started.

    A line that begins with `potstill serve` goes on in the background once it is ready; what a block exports is
    there in the next ones, and a block with a title is also written to that file. With `fakes` a fake stands in for
    vLLM, and plain commands and Python run in this process, which has imported what takes long to import.
    """

    def __init__(
        self, folder: Path, *, fakes: bool, instead: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._fakes = fakes
        self._instead = instead
        programs = folder.parent / f"{folder.name}-programs"
        programs.mkdir()
        module = "tests.documentation.potstill_with_fakes" if fakes else "potstill.clients.cli"
        _program(programs / "potstill", f'exec {sys.executable} -m {module} "$@"')
        _program(programs / "python", f'exec {sys.executable} "$@"')
        given = {name: value for name, value in os.environ.items() if not name.startswith(("POTSTILL_", "AWS_"))}
        paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self._environment = {**given, **paths, **environment}
        self._services: list[subprocess.Popen[str] | Forked] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for service in self._services:
            service.send_signal(signal.SIGTERM)
        for service in self._services:
            with service:
                service.communicate(timeout=_STOP_SECONDS)

    def run(self, block: Block) -> None:
        """Run a block that is `python` or `bash`, or check one that is `toml`."""
        text = block.text
        for theirs, ours in self._instead.items():
            text = text.replace(theirs, ours)
        if block.title is not None:
            path = self._folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        match block.language:
            case "toml":
                check_settings(text)
            case "python" if self._fakes:
                with self._inside():
                    exec(compile(text, block.place, "exec"), {"__name__": "__main__"})
            case "python":
                self._execute(block, [sys.executable, "-c", text])
            case "bash":
                self._bash(block, text)
            case _:
                raise AssertionError(f"{block.place}: {block.language!r} is no language that is run")

    def _bash(self, block: Block, text: str) -> None:
        lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
        for command in (line for line in lines if line.startswith("potstill serve")):
            self._serve(block, command)
        lines = [line for line in lines if not line.startswith("potstill serve")]
        if self._fakes and all(line.startswith("potstill ") and not _SHELL.search(line) for line in lines):
            for line in lines:
                with self._inside():
                    status = main(shlex.split(line, comments=True)[1:])
                assert status == 0, f"{block.place}: {line} ended with {status}"
        else:
            self._shell(block, "\n".join(lines))

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """This process as one that was started by the page: its folder, its environment, Python's usual warnings."""
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(self._environment)
        try:
            with contextlib.chdir(self._folder), fakes_in_place_of_vllm(), warnings.catch_warnings():
                warnings.simplefilter("default")
                yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def _shell(self, block: Block, script: str) -> None:
        exported = self._folder.parent / f"{self._folder.name}-exported"
        self._execute(block, ["bash", "-euo", "pipefail", "-c", f"{script}\nenv -0 > {exported}"])
        lines = exported.read_text(encoding="utf-8").split("\0")
        self._environment = dict(line.split("=", 1) for line in lines if line)

    def _execute(self, block: Block, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{block.text}\nIt said:\n{said}"

    def _serve(self, block: Block, command: str) -> None:
        service: subprocess.Popen[str] | Forked
        if self._fakes:
            service = Forked(serve_with_fakes, self._folder, command, environment=self._environment)
            log = service.log
        else:
            log = self._folder.parent / f"{self._folder.name}-service-{len(self._services)}.log"
            with log.open("w") as stderr:
                service = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self._folder,
                    env=self._environment,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
        self._services.append(service)
        assert service.stdout is not None
        said = service.stdout.readline()
        while said and not said.startswith("ready: "):
            said = service.stdout.readline()
        assert said, f"{block.place}: {command} did not start:\n{log.read_text()[-2000:]}"


def check_settings(text: str) -> None:
    """Read a TOML block as what it is: settings of an ablation, of a run, or of a service without teachers."""
    value = tomllib.loads(text)
    if "baseline" in value:
        GridConfig.model_validate(value)
    elif "rules" in value:
        FilterPlan.of(value)
    elif "train" in value or "student" in value or "data" in value:
        TrainConfig.of(value)
    else:
        ServiceSettings.model_validate({"teachers": [{"name": "big", "model": "path/to/model"}], **value})


def _program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)
