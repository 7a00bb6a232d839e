"""`potstill verify`: compare every byte of a cache with what was committed, or a sample with a live teacher."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from potstill.cache.commands.progress import progress
from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.teacher_options import add_teacher_options, teacher_options
from potstill.cache.entry_points import name_and_model, open_teacher
from potstill.cache.errors import CorruptSegment, FormatError, InvalidInput, UnknownTeacher
from potstill.cache.fields import option_of
from potstill.cache.logins import without_login
from potstill.cache.plurals import counted
from potstill.cache.types import JSON

if TYPE_CHECKING:
    from potstill.cache.targets import TargetSet
    from potstill.cache.upkeep.drift import Drift
    from potstill.cache.upkeep.integrity import Checked

SUMMARY = "check every byte of a cache, or a sample against a live teacher"

# The status by which a shell reports a process that SIGINT ended.
_INTERRUPTED = 128 + 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument(
        "--json", action="store_true", help='print {"ok", "shards_checked", "corrupt"}, and "unreachable" if any'
    )
    parser.add_argument("--decode", action="store_true", help="also decode all values, as a reader does (slower)")
    parser.add_argument("--jobs", type=int, default=4, help="groups read at one time (default %(default)s)")
    live = parser.add_argument_group("against a live teacher (reads and scores the sample only)")
    live.add_argument(
        "--live", metavar="NAME=MODEL_OR_URL", help="the teacher, and the model or service that is to answer like it"
    )
    add_teacher_options(live)
    live.add_argument("--sample", type=int, default=16, help="rows to score again (default %(default)s)")
    live.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")
    live.add_argument("--corpus", metavar="NAME", help="only this corpus (default: all the teacher has targets for)")
    live.add_argument(
        "--tolerance", type=float, default=0.02, help="nats over the encoding's own bound (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Check, and print the findings; exit status 1 when anything is not as committed or drifted, 130 when stopped."""
    if args.live is not None:
        return _run_live(args)
    if args.corpus is not None:
        raise InvalidInput("--corpus goes with --live; without it the whole cache is checked")
    if args.option:
        raise InvalidInput("--option goes with --live; without it no teacher is opened")
    if args.jobs < 1:
        raise InvalidInput(f"--jobs is {args.jobs}; it must be at least 1")
    return _run_checks(args)


@dataclass(slots=True)
class _Summary:
    shards: int = 0
    others: int = 0
    corrupt: dict[str, None] = field(default_factory=dict)
    """Lines in the order of their finding, each once: a damaged rank table or manifest is met at every shard."""
    unreachable: dict[str, None] = field(default_factory=dict)
    """One line for each group that the store did not give; they count as not checked."""
    again: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Shards that have to be scored again, by segment set and the options of the prefill that does it."""

    @property
    def nothing(self) -> bool:
        """True when nothing was checked; that counts as a failure, as it is more likely a wrong path."""
        return not (self.shards or self.others or self.unreachable)

    @property
    def looked_at(self) -> int:
        """Number of groups that were checked or tried."""
        return self.shards + self.others + len(self.unreachable)

    def add(self, checked: Checked) -> None:
        if checked.unreachable:
            self.unreachable[checked.unreachable] = None
            return
        self.corrupt.update(dict.fromkeys(checked.problems))
        if checked.refill:
            path, _, commit = checked.path.rpartition("/commits/")
            self.again.setdefault((path, checked.refill), []).append(int(commit.removesuffix(".json")))
        if checked.is_shard:
            self.shards += 1
        else:
            self.others += 1


def _run_checks(args: argparse.Namespace) -> int:
    from potstill.cache.store import Root
    from potstill.cache.upkeep import check_cache
    from potstill.cache.upkeep.integrity import count_checks

    root = Root.open(args.cache)
    found = _Summary()
    stopped = False
    with progress("verify", "groups") as show:
        total = count_checks(root)
        try:
            with closing(check_cache(root, decode=args.decode, jobs=args.jobs)) as checks:
                for checked in checks:
                    found.add(checked)
                    note = f"{len(found.corrupt):,} corrupt" if found.corrupt else ""
                    show(found.looked_at, total, note)
        except KeyboardInterrupt:
            stopped = True
    ok = not (found.corrupt or found.unreachable or stopped or found.nothing)
    if args.json:
        answer: dict[str, Any] = {"ok": ok, "shards_checked": found.shards, "corrupt": list(found.corrupt)}
        if found.unreachable:
            answer["unreachable"] = list(found.unreachable)
        print(json.dumps(answer, indent=1))
    else:
        _print_findings(args.cache, found, stopped=stopped, total=total)
    if stopped:
        return _INTERRUPTED
    return 0 if ok else 1


def _print_findings(root: str, found: _Summary, *, stopped: bool, total: int) -> None:
    for line in found.corrupt:
        print(f"corrupt: {line}")
    for line in found.unreachable:
        print(f"unreachable: {line}")
    _print_ways_out(root, found)
    if found.nothing and not stopped:
        print(f"there is nothing to check in {without_login(root)}; `potstill ingest` makes a cache")
        return
    checked = f"{counted(found.shards, 'shard')} and {counted(found.others, 'other group')} checked"
    corrupt = counted(len(found.corrupt), "corrupt object")
    if found.unreachable:
        corrupt += f", {counted(len(found.unreachable), 'group')} not checked, as the store did not give it"
    if stopped:
        left = max(total - found.looked_at, 0)
        print(f"stopped: {checked}, {corrupt}; about {counted(left, 'group')} not looked at")
    else:
        print(f"{checked}, {corrupt}")


def _print_ways_out(root: str, found: _Summary) -> None:
    from potstill.cache.upkeep.delete import set_arguments

    place = shlex.quote(without_login(root))
    for (path, options), shards in found.again.items():
        teacher, corpus = path.split("/")[1:3]
        told = f"score the damaged shards of {path} again, with the teacher that they are of"
        again = f"prefill --cache {place} --corpus {corpus} --teacher {teacher}=MODEL_OR_URL {options}"
        if option_of("alignment") in options.split():
            told = f"project the damaged shards of {path} again"
            again = f"project --cache {place} --corpus {corpus} --teacher {teacher} --from CORPUS_OF_ITS_OWN"
        print(f"to {told}:")
        print(f"  potstill delete {place} {set_arguments(path)} --shard {' '.join(map(str, shards))}")
        print(f"  potstill {again}")
    if found.corrupt:
        print("for any other damaged object see `What to do about damage` in cache/FORMAT.md")


def _run_live(args: argparse.Namespace) -> int:
    from potstill.cache.cache import Cache

    name, spec = name_and_model(args.live, "--live")
    options = teacher_options(args.option, [(name, spec)])[name]
    if not args.tolerance >= 0:
        raise InvalidInput(f"--tolerance is {args.tolerance}; it must be at least 0 nats")
    cache = Cache.open(args.cache)
    corpora = [args.corpus] if args.corpus else [c for c in cache.corpora() if name in cache.teachers(c)]
    if not corpora:
        known = ", ".join(cache.root.folders("targets")) or "none"
        raise UnknownTeacher(f"teacher {name!r} has no targets in {args.cache}; there are those of: {known}")
    targets = {corpus: cache.targets(name, corpus).top_k_only() for corpus in corpora}
    if not args.corpus:
        # What was projected from another corpus is no teacher's answer to be compared with.
        targets = {corpus: held for corpus, held in targets.items() if not held.fields.alignment} or targets
    drifts, corrupt = asyncio.run(_measure(spec, options, targets, args))
    ok = not corrupt and all(drift.within(args.tolerance) for drift in drifts.values())
    if args.json:
        shown = {corpus: asdict(drift) for corpus, drift in drifts.items()}
        answer: dict[str, Any] = {"ok": ok, "shards_checked": 0, "corrupt": corrupt, "drift": {name: shown}}
        print(json.dumps(answer, indent=1))
    else:
        for line in corrupt:
            print(f"corrupt: {line}")
        for corpus, drift in drifts.items():
            _print_drift(name, corpus, drift, args.tolerance)
    return 0 if ok else 1


async def _measure(
    spec: str, options: Mapping[str, JSON], targets: dict[str, TargetSet], args: argparse.Namespace
) -> tuple[dict[str, Drift], list[str]]:
    """Measure the drift of a sample of each corpus; also one line for each corpus that cannot be read."""
    import sys

    from potstill.cache.upkeep import measure_drift
    from potstill.cache.upkeep.drift import check_same_vocabulary, sample_rows

    drifts: dict[str, Drift] = {}
    corrupt: list[str] = []
    async with open_teacher(spec, options=options) as teacher:
        for corpus, held in targets.items():
            differences = check_same_vocabulary(held.identity, teacher.identity)
            if differences:
                print(f"{held.teacher} on {corpus}: stored != live: {differences}", file=sys.stderr)
            try:
                rows = sample_rows(held, args.sample, args.seed)
                drifts[corpus] = await measure_drift(teacher, held, rows)
            except (CorruptSegment, FormatError) as error:
                corrupt.append(error.detail)
    return drifts, corrupt


def _print_drift(teacher: str, corpus: str, drift: Drift, tolerance: float) -> None:
    verdict = "within" if drift.within(tolerance) else "MORE THAN"
    print(
        f"{teacher} on {corpus}: {counted(drift.rows, 'row')}, {counted(drift.positions, 'position')} scored again; "
        f"|logprob difference| max {drift.max_abs:.4f}, mean {drift.mean_abs:.5f} nats; "
        f"KL(stored || live) mean {drift.mean_kl:.2e} nats; "
        f"{drift.same_ids:.2%} of the ids are the same; labels max {drift.label_max_abs:.4f} nats"
    )
    print(f"  {verdict} the bound of {drift.encoding}, {drift.bound:g} nats, and a tolerance of {tolerance:g}")
