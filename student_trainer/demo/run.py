"""The stages of the demo, in order. After an interruption the same call goes on; after the end it starts anew."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill.cache.cache import Cache
from potstill.cache.commands.prefill import prefill
from potstill.cache.corpus import Corpus, IngestPlan
from potstill.cache.corpus.ingest import ingest
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.corpus.tokenizer_files import load_tokenizer_files
from potstill.cache.errors import InvalidInput
from potstill.cache.fill import FillPlan, FillReport
from potstill.cache.plurals import counted
from potstill.cache.types import JSON, Fields
from potstill.clients.http_teacher import HttpTeacher
from potstill.student_trainer.demo.plan import CORPUS, TEACHER, DemoPlan
from potstill.student_trainer.demo.report import write_report
from potstill.student_trainer.demo.service import running_service
from potstill.student_trainer.demo.smollm2 import is_materialised, materialise
from potstill.student_trainer.demo.text import write_text
from potstill.student_trainer.evaluate.result import TrainResult
from potstill.student_trainer.metrics.records import read_metrics

_STAMP = ".potstill-demo.json"
"""Says that a folder is a demo's, and of which plan."""

_DISTILLED = "distilled"
_STUDENTS = ("cross-entropy", _DISTILLED)
_WRITTEN_ROWS = 3


@dataclass(slots=True)
class _Stages:
    """Prints each stage as it begins, and keeps the seconds that it took."""

    console: Console
    total: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        self.console.print(f"[bold][{len(self.seconds) + 1}/{self.total}][/bold] {what}", highlight=False)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        self.console.print(f"      {self.seconds[name]:.0f} s", style="dim", highlight=False)


def run_demo(plan: DemoPlan, console: Console, train: Callable[[DemoPlan, str], TrainResult]) -> dict[str, Any]:
    """Run every stage; return the report, which is also written to `plan.out`.

    Raises:
        PotstillError: whatever a stage raises; what was done so far is kept for the next call.
    """
    _begin(plan)
    stages = _Stages(console, 6)
    with stages.stage("teacher", _teacher_text(plan)):
        model = materialise(plan.models)
    with stages.stage("ingest", "ingest the help topics of the standard library into a sealed corpus"):
        cache, corpus = _ingest(plan, model)
        console.print(
            f"      {counted(corpus.num_positions, 'token')} in {counted(len(corpus), 'row')}, "
            f"{counted(corpus.num_shards, 'shard')}"
        )
    log = plan.out / "service.log"
    with (
        stages.stage("prefill", "start the service and prefill the cache through it"),
        running_service(["--teacher", f"{TEACHER}={model}", "--cache", str(plan.cache), "--port", "0"], log) as url,
    ):
        console.print(f"      serving at {url}; log: {log}")
        filled = asyncio.run(_prefill(plan, cache, url))
        console.print(f"      {asyncio.run(_ask_service(url, corpus))}")
    results = {}
    for student in _STUDENTS:
        with stages.stage(student, f"train the {student} student on Ray, {plan.steps} steps"):
            results[student] = train(plan, student)
    with stages.stage("report", "compare the two students and write the report"):
        report = _report(plan, cache, corpus, results, model)
    report["saved"] = _saved(filled, results)
    report["seconds"] = stages.seconds
    write_report(plan.out, report)
    return report


def _begin(plan: DemoPlan) -> None:
    """Clear away a finished demo, or one of another plan; leave an unfinished one of this plan to go on.

    Raises:
        InvalidInput: the folder holds something else; nothing in it is touched.
    """
    stamp = plan.out / _STAMP
    if not stamp.is_file() and plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
        raise InvalidInput(f"--out {str(plan.out)!r} is not empty and holds no demo; choose another folder")
    text = json.dumps({n: str(getattr(plan, n)) for n in plan.__dataclass_fields__}, indent=1)
    unfinished = stamp.is_file() and stamp.read_text() == text and not (plan.out / "report.json").is_file()
    if not unfinished:
        for name in ("cache", "runs", "text"):
            shutil.rmtree(plan.out / name, ignore_errors=True)
        (plan.out / "report.json").unlink(missing_ok=True)
    plan.out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(text)


def _teacher_text(plan: DemoPlan) -> str:
    if is_materialised(plan.models):
        return f"the teacher SmolLM2-135M is ready in {plan.models}"
    return f"unpack the teacher SmolLM2-135M into {plan.models} (once; about a minute)"


def _ingest(plan: DemoPlan, model: Path) -> tuple[Cache, Corpus]:
    cache = Cache.open(plan.cache, mode="r+")
    if CORPUS in cache.corpora():
        return cache, cache.corpus(CORPUS)
    tokenizer = load_tokenizer(model)
    write_text(plan.text, tokenizer, plan.text_tokens)
    how = IngestPlan(row_tokens=plan.row_tokens, shard_positions=plan.shard_positions)
    files = load_tokenizer_files(model)
    return cache, ingest(cache.root, CORPUS, [plan.text], tokenizer, how, tokenizer_files=files)


async def _prefill(plan: DemoPlan, cache: Cache, url: str) -> FillReport | None:
    how = FillPlan(batch_tokens=4 * plan.row_tokens, in_flight=2)
    fields = Fields(k=plan.k)
    return await prefill(cache, CORPUS, TEACHER, f"{url}#{TEACHER}", fields=fields, encoding=plan.encoding, plan=how)


async def _ask_service(url: str, corpus: Corpus) -> str:
    """One row over HTTP, as any trainer would ask for it: answered from what was just prefilled."""
    row = corpus.row(0)
    async with HttpTeacher.open(url, TEACHER) as teacher:
        began = time.monotonic()
        (targets,) = await teacher.score([row], Fields(k=8))
        seconds = time.monotonic() - began
    return f"row 0 over HTTP from the cache: {targets.num_positions} positions in {1000 * seconds:.0f} ms"


def _report(
    plan: DemoPlan, cache: Cache, corpus: Corpus, results: dict[str, TrainResult], teacher: Path
) -> dict[str, Any]:
    from potstill.student_trainer.data.held_out import choose_held_out
    from potstill.student_trainer.evaluate.samples import samples, writings
    from potstill.student_trainer.models.build import load_student

    targets = cache.targets(TEACHER, CORPUS)
    commits = [commit for each in targets.sets for commit in each.commits.all()]
    held_out = choose_held_out(corpus.document_rows, plan.held_out_rows, 0, CORPUS)
    rows = [int(row) for row in held_out if len(corpus.row(int(row))) >= plan.row_tokens // 2][:4]
    students = {name: load_student(result.run_dir / "model") for name, result in results.items()}
    written = writings(corpus, rows[:_WRITTEN_ROWS], {"teacher": load_student(teacher), **students})
    shown = samples(corpus, rows, {"teacher": targets.read_rows(rows)}, students)
    return {
        "teacher": targets.identity.to_json(),
        "corpus": {"rows": len(corpus), "positions": corpus.num_positions, "shards": corpus.num_shards},
        "targets": {
            "k": targets.fields.k,
            "encoding": targets.encoding.to_json(),
            "bytes_per_position": sum(c.num_bytes for c in commits) / corpus.num_positions,
            "max_abs_error": max(c.error["max_abs"] for c in commits),
            "mean_kl": max(c.error["mean_kl"] for c in commits),
        },
        "students": {name: _student(result) for name, result in results.items()},
        "plan": {name: getattr(plan, name) for name in _PLAN_NUMBERS},
        "writings": [asdict(writing) for writing in written],
        "samples": [asdict(sample) for sample in shown],
    }


def _saved(filled: FillReport | None, results: dict[str, TrainResult]) -> dict[str, JSON]:
    """Positions that the distilled student read, and the teacher's speed; null if an earlier call had it score."""
    scored = filled is not None and filled.positions_scored > 0
    return {
        "positions_read": results[_DISTILLED].tokens,
        "tokens_per_second": filled.positions_scored / filled.seconds if filled and scored else None,
    }


_PLAN_NUMBERS = ("row_tokens", "held_out_rows", "steps", "batch_rows", "lr", "alpha", "seed", "hidden_size", "layers")


def _student(result: TrainResult) -> dict[str, JSON]:
    assert result.held_out is not None, "the demo always holds rows out"
    of_teacher = result.held_out.teachers[TEACHER]
    return {
        "held_out_loss": result.held_out.ce,
        "kl_to_teacher": of_teacher.kl,
        "top1_agreement": of_teacher.top1_agreement,
        "curve": [
            {"step": record["step"], "held_out_loss": record["held_out"]["ce"], "kl_to_teacher": kl}
            for record in read_metrics(result.run_dir)
            if "held_out" in record and (kl := record["held_out"]["teachers"][TEACHER]["kl"]) is not None
        ],
    }
