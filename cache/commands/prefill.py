"""`potstill prefill`: score the uncommitted shards of a corpus with a teacher."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from potstill.cache.commands.field_options import add_field_options, fields_of
from potstill.cache.commands.progress import progress
from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.teacher_options import add_teacher_options, teacher_options
from potstill.cache.entry_points import name_and_model, open_teacher
from potstill.cache.errors import CorruptSegment, FormatError, InvalidInput, SpecMismatch, StoreError
from potstill.cache.logins import without_login
from potstill.cache.plurals import counted
from potstill.cache.types import JSON, Fields, Teacher, TeacherIdentity

if TYPE_CHECKING:
    from potstill.cache.cache import Cache
    from potstill.cache.corpus import Corpus
    from potstill.cache.fill import FillPlan, FillReport
    from potstill.cache.targets import TargetSet

SUMMARY = "score a corpus with a teacher and keep its targets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--corpus", required=True, metavar="NAME", help="the corpus to score, which `ingest` made")
    parser.add_argument(
        "--teacher",
        required=True,
        action="append",
        metavar="NAME=MODEL_OR_URL",
        help="a model folder or name (the engine runs in this process), or http://host:port#NAME "
        "(a running service); may be given again",
    )
    add_teacher_options(parser)
    add_field_options(parser)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a batch (default %(default)s)")
    parser.add_argument("--in-flight", type=int, default=4, help="batches at the teacher (default %(default)s)")
    parser.add_argument(
        "--claim-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="other jobs on the corpus take over what a job was silent about for so long (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Fill one teacher after the other; committed shards stay, and the same command goes on from there."""
    from potstill.cache.cache import Cache
    from potstill.cache.encoding.logprobs import encoding_by_name
    from potstill.cache.fill import FillPlan
    from potstill.cache.store.root import check_name

    fields = fields_of(args)
    encoding_by_name(args.encoding)
    plan = FillPlan(batch_tokens=args.batch_tokens, in_flight=args.in_flight, claim_seconds=args.claim_seconds)
    teachers = [name_and_model(text) for text in args.teacher]
    for name, _ in teachers:
        check_name("teacher", name)
    options = teacher_options(args.option, teachers)
    # Opened to read first: a mistyped folder must not be made.
    cache = Cache.open(args.cache)
    cache.corpus(args.corpus)
    cache = Cache.open(args.cache, mode="r+")
    for name, spec in teachers:
        kept = {"fields": fields, "encoding": args.encoding}
        work = prefill(cache, args.corpus, name, spec, **kept, plan=plan, options=options[name])
        _run_until_signal(work)
    return 0


async def prefill(
    cache: Cache,
    corpus_name: str,
    name: str,
    spec: str,
    *,
    fields: Fields,
    encoding: str,
    plan: FillPlan,
    options: Mapping[str, JSON] | None = None,
) -> FillReport | None:
    """Open the teacher `spec` with its `options` and fill the shards that have no commit, with progress and a summary.

    Returns the fill's report, or None when nothing was missing.

    Raises:
        LimitExceeded, SpecMismatch: the teacher does not fit the corpus or the targets; nothing was written.
        PotstillError: whatever opening, scoring or writing raises; committed shards stay.
    """
    corpus = cache.corpus(corpus_name)
    held = _held_identity(cache, corpus, name)
    if held is not None and _agrees(held, options or {}):
        planned = cache.plan_targets(name, corpus_name, held, fields=fields, encoding=encoding)
        if _nothing_to_do(planned, spec):
            return None
    print(f"{name}: opening the teacher {without_login(spec)}", flush=True)
    async with open_teacher(spec, options=options) as teacher:
        targets = _planned(cache, corpus, name, teacher, fields=fields, encoding=encoding)
        if targets.fields != fields:
            print(f"{name}: {_difference(fields, targets.fields)}", flush=True)
        report = await fill_with_progress(teacher, targets, plan)
    commits = [commit for each in targets.sets for commit in each.commits.all()]
    stored = sum(commit.num_bytes for commit in commits) / max(corpus.num_positions, 1)
    print(_summary(name, targets, report) + f"; {stored:.1f} bytes/position")
    return report


def _planned(cache: Cache, corpus: Corpus, name: str, teacher: Teacher, *, fields: Fields, encoding: str) -> TargetSet:
    """Plan the targets of an open teacher, and print what its tokenizer has to do with the corpus."""
    from potstill.cache.corpus.teacher_tokenizer import HasTokenizer
    from potstill.cache.fill.loop import require_within_limits
    from potstill.cache.targets.prefixes import prefix_warning

    own = teacher.tokenizer if isinstance(teacher, HasTokenizer) else None
    table = None if own is None else own.tokenizer
    targets = cache.plan_targets(name, corpus.name, teacher.identity, fields=fields, encoding=encoding, tokenizer=table)
    require_within_limits(teacher, targets)
    if targets.unshared:
        differs = f"its tokenizer differs from the corpus's in {targets.unshared.text} that no row uses"
        print(f"{name}: {differs}", flush=True)
    if warning := prefix_warning(name, corpus, teacher.identity, own):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return targets


def _held_identity(cache: Cache, corpus: Corpus, name: str) -> TeacherIdentity | None:
    """Identity of the targets that are there; None where there are none."""
    from potstill.cache.targets.target_set import has_targets

    return cache.targets(name, corpus.name).identity if has_targets(cache.root, name, corpus.name) else None


def _agrees(held: TeacherIdentity, options: Mapping[str, JSON]) -> bool:
    """Tell whether options that are part of an identity are as it has them, so that no engine has to tell."""
    known = held.to_json()
    return all(known[key] == value for key, value in options.items() if key in known)


def _nothing_to_do(targets: TargetSet, spec: str) -> bool:
    """Tell (and print) whether all shards are committed, so that no engine has to be started."""
    if not targets.committed.all():
        return False
    targets.fold()
    shards = targets.corpus.num_shards
    print(
        f"{targets.teacher}: {shards:,} of {counted(shards, 'shard')} committed ({shards:,} before), nothing to do; "
        f"{without_login(spec)} was not opened, so it was not checked to be the stored teacher "
        f"{targets.identity.model!r} still"
    )
    return True


def _difference(asked: Fields, left: Fields) -> str:
    kept, adding = (
        ", ".join(key for key, value in fields.to_json().items() if value and key != "seed") if fields else "nothing"
        for fields in (asked.without(left), left)
    )
    return f"{kept} is there already; filling {adding}"


def _committed_so_far(targets: TargetSet, unkept: int) -> str:
    lost = f"{counted(unkept, 'scored token')} of unfinished shards dropped, " if unkept else ""
    try:
        committed = targets.committed
    except StoreError:
        return lost  # it is what stopped the run, and is said there
    return f"{int(committed.sum()):,} of {counted(len(committed), 'shard')} committed so far, {lost}"


def _way_on(error: BaseException) -> str:
    """Say what the same command will do next time; the error's own line, which follows, does not say it."""
    if isinstance(error, (InvalidInput, SpecMismatch)):
        return "the same command would be refused again"
    if isinstance(error, (CorruptSegment, FormatError, StoreError)):
        return "the same command goes on with the rest once this is mended"
    return "the same command goes on with the rest"


async def fill_with_progress(teacher: Teacher, targets: TargetSet, plan: FillPlan) -> FillReport:
    """Fill what `targets` lacks, show the progress, and say what was kept and dropped when it stops early.

    Raises:
        PotstillError: whatever scoring or writing raises; committed shards stay.
    """
    from potstill.cache.fill import FillProgress, fill

    unkept = 0
    with progress(f"prefill {targets.teacher}", "tokens") as show:

        def on_progress(at: FillProgress) -> None:
            nonlocal unkept
            unkept = at.positions_unkept
            done = f"{at.shards_committed}/{counted(at.shards, 'shard')}"
            unfinished = f", {unkept:,} tokens of unfinished ones" if unkept else ""
            waiting = f", waiting for {counted(at.waiting_for, 'shard')} of other jobs" if at.waiting_for else ""
            show(at.positions_scored, at.positions, done + unfinished + waiting)

        try:
            return await fill(teacher, targets, plan, on_progress=on_progress)
        except BaseException as error:
            so_far = _committed_so_far(targets, unkept)
            print(f"{targets.teacher}: stopped; {so_far}{_way_on(error)}", flush=True)
            raise


def _summary(name: str, targets: TargetSet, report: FillReport) -> str:
    shards = targets.corpus.num_shards
    lost = f", {report.shards_elsewhere} by other jobs meanwhile" if report.shards_elsewhere else ""
    if report.shards_lost:
        lost += f", {report.shards_lost} scored here in vain"
    return (
        f"{name}: {shards:,} of {counted(shards, 'shard')} committed ({report.shards_before:,} before{lost}); scored "
        f"{counted(report.positions_scored, 'position')} in {report.seconds:.1f} s, "
        f"{report.positions_scored / max(report.seconds, 1e-9):,.0f} tokens/s"
    )


def _run_until_signal(work: Coroutine[Any, Any, object]) -> None:
    """Run to the end, as `asyncio.run`, but with SIGTERM stopping as cleanly as Ctrl-C does."""

    async def main() -> None:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    asyncio.run(main())
