"""The study: its stages in order, each of which goes on from what is there."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.study.comparing import Results
from benchmarks.study.corpora import prepare_corpora
from benchmarks.study.facts import facts
from benchmarks.study.page import write_page
from benchmarks.study.plan import Cell, Plan
from benchmarks.study.results import Result, load_results
from benchmarks.study.runs import trained_and_judged
from benchmarks.study.teachers import Opener, Scoring, Stopped, prepare_first, prepare_second
from benchmarks.study.text import prepare_text, text_sha256
from potstill.cache import Cache
from potstill.cache.errors import InvalidInput, PotstillError, SpecMismatch
from potstill.student_trainer.config.run_folder import write_json


@dataclass(frozen=True, slots=True)
class Study:
    """One study in its folders."""

    plan: Plan
    folder: Path
    """For all that is large: text, cache and runs."""
    docs: Path
    """For what is published: `study.md`, and `study/` with the results, the text's manifest and the plots."""
    opener: Opener | None = None
    """Opens teachers; by default each in an engine in a process of its own."""

    def run(self, model: Path, should_stop: Callable[[], bool]) -> None:
        """Go on until all runs are there, or until asked to stop.

        Args:
            model: folder of the first teacher.
            should_stop: asked now and then.

        Raises:
            PotstillError: a stage or a run failed; what was done before is kept.
        """
        scoring = Scoring(self.folder, should_stop, self.opener)
        try:
            with self._locked("stages", wait=True):
                manifest = self._manifest(prepare_text(self.plan, self.folder))
                self._results(manifest)
                cache = prepare_corpora(self.plan, self.folder, model)
                prepare_first(self.plan, cache, model, scoring)
            # All seeds of a cell before the next cell: a claim has its verdict as soon as its cells are there.
            for cell, seed in itertools.product(self.plan.cells, self.plan.seeds):
                self._run_one(cell, seed, cache, model, scoring, manifest)
        except Stopped:
            print("stopped; the same command goes on from there", flush=True)

    def write_page(self) -> str:
        """Publish the results and write the page of them; return a line that says so.

        Raises:
            InvalidInput: there was no run yet. SpecMismatch: a result is of another plan or text.
        """
        files = [where / "text.json" for where in (self.docs / "study", self.folder)]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise InvalidInput(f"{str(files[0])!r} is not there: run the study first, with --hours 2")
        manifest = self._manifest(json.loads(file.read_text(encoding="utf-8")))
        results = Results(self.plan, self._results(manifest))
        for each in results.found.values():
            each.save(self.docs / "study" / "results")
        write_page(self.docs, results, manifest, self._facts())
        total = len(self.plan.cells) * len(self.plan.seeds)
        return f"{len(results.found)} of {total} runs are there: {self.docs / 'study.md'}"

    def _run_one(
        self, cell: Cell, seed: int, cache: Cache, model: Path, scoring: Scoring, manifest: dict[str, object]
    ) -> None:
        """Do one run, unless it is there or another process has it."""
        with self._locked(f"{cell.name}-{seed}") as mine:
            if not mine or (cell.name, seed) in self._results(manifest):
                return
            if scoring.should_stop():
                raise Stopped
            if cell.needs_second:
                with self._locked("stages", wait=True):
                    prepare_second(self.plan, cache, model, scoring)
            began = time.monotonic()
            how = {
                "sha256": self.plan.sha256(cell.name, text_sha256(manifest)),
                "made": made(),
                "should_stop": scoring.should_stop,
            }
            try:
                result = trained_and_judged(self.plan, cell, seed, self.folder, model, **how)  # type: ignore[arg-type]
            except PotstillError as error:
                print(f"{cell.name}, seed {seed}: {error.kind}: {error.detail}", flush=True)
                return
            result.save(self.folder / "results")
            shutil.rmtree(self.folder / "runs" / f"{cell.name}-{seed}")
            told = f"{time.monotonic() - began:.0f} s, of which {result.seconds:.0f} trained {result.tokens} tokens"
            print(f"{cell.name}, seed {seed}: {told}", flush=True)

    def _manifest(self, found: dict[str, object]) -> dict[str, object]:
        """Compare the text with that of the results, or publish what it is.

        Raises:
            SpecMismatch: this machine's text is another.
        """
        file = self.docs / "study" / "text.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
        there = json.loads(file.read_text(encoding="utf-8"))
        other = [kind for kind, each in there["kinds"].items() if each != found["kinds"].get(kind)]  # type: ignore[attr-defined]
        if other:
            raise SpecMismatch(
                f"the text of {', '.join(other)} is not that of {str(file)!r}: the packages have changed; get those of "
                "before, or move docs/study away and begin anew"
            )
        return found

    def _facts(self) -> dict[str, Any] | None:
        """Read what is known of the first teacher's targets, or find it out where they are at hand."""
        file = self.docs / "study" / "teacher.json"
        if not file.exists() and (found := facts(self.plan, self.folder)) is not None:
            write_json(file, found)
        told: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return told

    def _results(self, manifest: dict[str, object]) -> dict[tuple[str, int], Result]:
        folders = (self.docs / "study" / "results", self.folder / "results")
        return load_results(folders, self.plan, text_sha256(manifest))

    @contextmanager
    def _locked(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Hold a lock that ends with the process; gives False where another has it and is not waited for."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def made() -> dict[str, str]:
    """Say where, when and by what a result is made."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {_processor()}",
        "commit": commit.stdout.strip(),
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "torch": version("torch"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(known) or 'no AVX2'})"
