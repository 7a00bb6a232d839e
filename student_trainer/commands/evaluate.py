"""`potstill evaluate RUN|MODEL`: what a student knows of text that it never saw, and of its teachers."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from potstill.student_trainer.evaluate.evidence import Evidence
    from potstill.student_trainer.evaluate.judged import Subject
    from potstill.student_trainer.evaluate.tasks.harness import Tasks
    from potstill.student_trainer.evaluate.tasks.outcome import TaskOutcomes

SUMMARY = "measure a student on unseen text, and by its teachers"
_NAMED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "subject",
        metavar="RUN|MODEL",
        help="run of `potstill train`, its folder or URL, or a model that transformers loads",
    )
    parser.add_argument("--cache", metavar="ROOT", help="cache with the corpora; of a run, where it is now")
    parser.add_argument(
        "--corpus", metavar="NAME", action="append", default=[], help="(further) corpus to evaluate on; may be repeated"
    )
    parser.add_argument(
        "--tasks",
        metavar="FOLDER|NAMES",
        help="tasks of the lm-evaluation-harness: a folder with its YAML, or with questions as TruthfulQA, ARC or MMLU "
        "writes them (JSON, JSONL); or names of its own, with commas between, whose data is downloaded",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with charts and samples")


def run(args: argparse.Namespace) -> int:
    """Measure the final model of a run, or its newest checkpoint, or another model; print what was found."""
    import json

    from potstill.cache.named_files import require_folder_of
    from potstill.student_trainer.evaluate.result import HELD_OUT

    if args.html is not None:
        require_folder_of(args.html, "--html")
    opened = _opened(args)
    from potstill.student_trainer.evaluate.evidence import evidence_json

    with ExitStack() as stack:
        # Before rows are measured for hours: a task may be of no use.
        tasks = None if args.tasks is None else stack.enter_context(_tasks(args.tasks))
        subject = stack.enter_context(opened)
        try:
            found, outcomes = _measured(subject, tasks)
        except KeyboardInterrupt:
            sys.stderr.write("stopped: nothing of it is kept; the same command begins again\n")
            raise
        if args.html is not None:
            _write_page(args.html, subject, _titled(found), outcomes)
    if args.json:
        held_out = found.pop(HELD_OUT, None)
        of_tasks = {} if outcomes is None else outcomes.to_json()
        print(json.dumps(evidence_json(held_out, found, {"model": subject.name}) | of_tasks))
        return 0
    _print(_titled(found), outcomes)
    if args.html is not None:
        print(f"page: {args.html}")
    return 0


def _tasks(asked: str) -> AbstractContextManager[Tasks]:
    from potstill.student_trainer.evaluate.tasks.harness import open_tasks

    return open_tasks(asked)


def _measured(subject: Subject, tasks: Tasks | None) -> tuple[dict[str, Evidence], TaskOutcomes | None]:
    from potstill.cache.commands.progress import progress
    from potstill.student_trainer.evaluate.judged import judge

    tokenizer = None if tasks is None else _tokenizer(subject)
    with progress("evaluate", "rows") as show:
        found = judge(subject, lambda done: show(done, subject.num_rows))
    if tasks is None or tokenizer is None:
        return found, None
    from potstill.student_trainer.evaluate.tasks.harness import run_tasks

    with progress("tasks", "requests") as show:
        return found, run_tasks(tasks, subject.model, tokenizer, show)


def _tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    from potstill.student_trainer.evaluate.tasks.harness import check_tokenizer

    tokenizer = subject.tokenizer()
    check_tokenizer(tokenizer, subject.corpus)
    return tokenizer


def _opened(args: argparse.Namespace) -> AbstractContextManager[Subject]:
    """The run or the model that was asked for, with what to judge it by; what needs no torch is checked at once.

    Raises:
        NotFound: it is neither. InvalidInput: a model without a cache or a corpus, or tasks; a run without rows.
        PotstillError: a cache, a corpus or a teacher is not there.
    """
    from potstill.cache.errors import InvalidInput, NotFound
    from potstill.cache.hub import may_be_hub_name, require_reachable
    from potstill.student_trainer.train.named import require_corpora, require_to_judge

    folder = Path(args.subject)
    if "://" in args.subject or _is_run(folder):
        if "://" not in args.subject:
            require_to_judge(folder, args.cache, args.corpus, rows_needed=args.tasks is None)
        from potstill.student_trainer.train.judged import run_to_judge

        return run_to_judge(args.subject, cache=args.cache, corpora=args.corpus, rows_needed=args.tasks is None)
    if not may_be_hub_name(args.subject) and not (folder / "config.json").is_file():
        inside = _runs_inside(folder)
        also = f", but it holds the runs {inside}: name one" if inside else ""
        raise NotFound(f"{args.subject!r} is neither the folder of a run nor of a model: there is no config.json{also}")
    if not folder.exists():
        require_reachable(args.subject, "RUN|MODEL")
    if args.tasks is not None and args.cache is None and not args.corpus:
        from potstill.student_trainer.evaluate.other_model import model_alone

        return model_alone(args.subject)
    if args.cache is None or not args.corpus:
        lacking = "--cache ROOT" if args.cache is None else "--corpus NAME"
        raise InvalidInput(
            f"{args.subject!r} is a model and no run, so what to evaluate it on is not known; add {lacking}"
        )
    require_corpora(args.cache, args.corpus)
    from potstill.student_trainer.evaluate.other_model import model_to_judge

    return model_to_judge(args.subject, args.cache, args.corpus)


def _is_run(folder: Path) -> bool:
    """Tell the `config.json` of a run from that of a model."""
    import json

    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and "train" in value


def _runs_inside(folder: Path) -> str:
    """Name a few runs in a folder that somebody keeps them in, or in that of an ablation."""
    for pattern in ("*/config.json", "runs/*/*/config.json", "*/*/config.json"):
        runs = [str(file.parent) for file in sorted(folder.glob(pattern)) if _is_run(file.parent)]
        if runs:
            more = f" and {len(runs) - _NAMED:,} more" if len(runs) > _NAMED else ""
            return ", ".join(map(repr, runs[:_NAMED])) + more
    return ""


def _titled(found: dict[str, Evidence]) -> dict[str, Evidence]:
    from potstill.student_trainer.evaluate.result import HELD_OUT

    return {"held-out rows" if name == HELD_OUT else name: evidence for name, evidence in found.items()}


def _print(found: dict[str, Evidence], outcomes: TaskOutcomes | None) -> None:
    from potstill.student_trainer.evaluate.tables import headline, parts, tasks, teachers

    tables = [("", headline(found))] if found else []
    for name, evidence in found.items():
        tables += [(f"{name}: against teachers", teachers(evidence))] if evidence.teachers else []
        tables.append((f"{name}: by kind of the next token", parts("next token", evidence.by_category)))
        tables += [(f"{name}: by source", parts("source", evidence.by_source))] if evidence.by_source else []
    tables += [] if outcomes is None else [(f"tasks of lm_eval {outcomes.version}", tasks(outcomes))]
    for title, table in tables:
        _print_table(title, table.headings, table.rows)
    notes = [note for evidence in found.values() for note in evidence.notes]
    for note in dict.fromkeys([*notes, *(() if outcomes is None else outcomes.notes)]):
        print(f"note: {note}")


def _print_table(title: str, headings: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> None:
    from operator import itemgetter

    from potstill.cache.commands.tables import print_table

    print_table({heading: itemgetter(i) for i, heading in enumerate(headings)}, rows, title=title)
    if not title:
        print()


def _write_page(file: Path, subject: Subject, found: dict[str, Evidence], outcomes: TaskOutcomes | None) -> None:
    from potstill.student_trainer.evaluate.report import write_page
    from potstill.student_trainer.evaluate.shown_rows import texts_of

    write_page(file, subject.name, found, *texts_of(subject), outcomes)
