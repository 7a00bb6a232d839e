"""Damages a small cache in every way that disks, copies and hostile writers do, one fault at a time.

Of each fault `verify` must tell, and whatever reads the cache must get exactly the right numbers or an error that
names the object: never wrong numbers, another exception, or a dead process. Only two things may pass `verify`: a
record that is gone (what it published reads as never written), and a lie of a writer that changes no number.

Exits 1 when anything else happens.

    python -m benchmarks.bench_flips [--flips 2000] [--jobs 2] [--seed 0] [--only swap]
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from benchmarks.support.flip_cache import MISS, Probe, View, build, probes
from benchmarks.support.flip_faults import Fault, copies, cuts, flips, group_swaps, lying_arrays, lying_records, swaps
from potstill.cache import Cache
from potstill.cache.errors import (
    CorruptSegment,
    FormatError,
    InvalidInput,
    NotFound,
    PotstillError,
    SpecMismatch,
    UnsupportedField,
)
from potstill.cache.store.pipelines import PIPELINES, codec_pipeline
from potstill.cache.store.root import Root
from potstill.cache.upkeep.integrity import check_cache

# What a reader may be told of damage. A set whose record is gone is not there, nor are its fields.
_NAMED = (CorruptSegment, FormatError, SpecMismatch, NotFound, UnsupportedField)
_PUBLISHING = ("corpus seal", "annotation record", "set record", "commit", "manifest record", "journal record")
_MEMORY_BYTES = 512 << 20
_ADDRESS_BYTES = 8 << 30
_SECONDS = 30


@dataclass(slots=True)
class Verdict:
    """Outcome of one fault."""

    fault: str
    kind: str
    reported: bool
    raised: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        """One of: reported, gone, refused (by readers alone), harmless, MISSED."""
        if self.problems:
            return "MISSED"
        if self.reported or self.fault == "delete":
            return "reported" if self.reported else "gone"
        return "refused" if self.raised else "harmless"


class TooLongError(BaseException):
    """Raised by the alarm, past everything that takes an `Exception` for a finding."""


def _too_long(*_: object) -> None:
    raise TooLongError


class Patient:
    """A cache that is damaged and healed again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.objects = {
            str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
        }
        self._probes = probes(Cache.open(root))
        view = View(root)
        self._right = {name: probe(view) for name, probe in self._probes.items()}
        assert not any(checked.problems for checked in check_cache(Root.open(root), decode=True)), "intact at first"
        self._most_memory = _peak_memory() + _MEMORY_BYTES

    def examine(self, fault: Fault, pipeline: str) -> Verdict:
        """Put a fault in, verify, read everything it can touch, and take it out again."""
        verdict = Verdict(fault.name, fault.kind, reported=False)
        where = f"{fault.name} of {' and '.join(list(fault.changes)[:2])}"
        try:
            for path, data in fault.changes.items():
                self._put(path, data)
            self._verify(fault, verdict)
            self._read(fault, verdict, pipeline)
        except TooLongError:
            verdict.problems.append(f"took more than {_SECONDS} s")
        finally:
            for path in fault.changes:
                self._put(path, self.objects[path])
        if _peak_memory() > self._most_memory:
            verdict.problems.append(f"peak memory is {_peak_memory() >> 20} MiB")
            self._most_memory = _peak_memory()
        verdict.problems = [f"{where}: {problem}" for problem in verdict.problems]
        return verdict

    def _verify(self, fault: Fault, verdict: Verdict) -> None:
        try:
            verdict.reported = any(each.problems for each in check_cache(Root.open(self._root), decode=fault.lies))
        except Exception as error:  # noqa: BLE001 - what must not happen is what this looks for
            verdict.problems.append(f"verify raised {error!r}")
        if not (verdict.reported or fault.lies or (fault.name == "delete" and fault.kind in _PUBLISHING)):
            verdict.problems.append("verify found nothing")

    def _read(self, fault: Fault, verdict: Verdict, pipeline: str) -> None:
        view = View(self._root, pipeline)
        for name, probe in self._touched(fault.changes):
            try:
                answer = probe(view)
            except _NAMED as error:
                verdict.raised += 1
                if not (isinstance(error, NotFound | UnsupportedField) or "/" in error.detail):
                    verdict.problems.append(f"{name} raised without naming an object: {error.detail}")
            except InvalidInput as error:
                # A corpus that says it is smaller than it was when the probe was made.
                if not (fault.lies and "outside corpus" in error.detail):
                    verdict.problems.append(f"{name} raised {error!r}")
            except Exception as error:  # noqa: BLE001 - as above
                verdict.problems.append(f"{name} raised {type(error).__name__}: {str(error)[:300]}")
            else:
                if not _is_right(name, answer, self._right[name]):
                    verdict.problems.append(f"{name} read WRONG NUMBERS ({pipeline})")

    def _touched(self, paths: Iterable[str]) -> list[tuple[str, Probe]]:
        """The reads that a fault can have an effect on: of its corpus, of its target set, of journals."""
        prefixes: set[str] = set()
        for path in paths:
            top, *names = path.split("/")
            if top == "corpora":
                prefixes |= {f"corpora/{names[0]} ", *(f"targets/{each}/{names[0]} " for each in ("one", "two"))}
            else:
                prefixes.add(f"targets/{names[0]}/{names[1]} " if top == "targets" else "journal ")
        return [(name, probe) for name, probe in self._probes.items() if name.startswith(tuple(prefixes))]

    def _put(self, path: str, data: bytes | None) -> None:
        file = self._root / path
        if data is None:
            file.unlink()
            return
        file.write_bytes(data)


def _is_right(name: str, answer: bytes, right: bytes) -> bool:
    if not name.startswith("journal "):
        return answer == right
    rows = [(answer[i : i + len(MISS)], right[i : i + len(MISS)]) for i in range(0, len(right), len(MISS))]
    return len(answer) == len(right) and all(ours in (theirs, MISS) for ours, theirs in rows)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def damages(objects: dict[str, bytes], num_flips: int, choose: random.Random) -> list[Fault]:
    """Every fault of a disk or a careless hand: none has a hash that fits."""
    return [
        *flips(objects, num_flips, choose),
        *cuts(objects, choose),
        *copies(objects, choose),
        *swaps(objects),
        *group_swaps(objects),
    ]


def all_faults(objects: dict[str, bytes], num_flips: int, num_lies: int, seed: int) -> list[Fault]:
    """Every fault of a run, always the same for a seed; of all lies so many of each sort and kind of object."""
    choose = random.Random(seed)
    lies = defaultdict(list)
    for lie in (*lying_records(objects), *lying_arrays(objects)):
        lies[lie.name, lie.kind].append(lie)
    each = max(1, num_lies // len(lies))
    return [
        *damages(objects, num_flips, choose),
        *(lie for same in lies.values() for lie in choose.sample(same, min(each, len(same)))),
    ]


def examine_all(folder: Path, number: int, jobs: int, args: argparse.Namespace) -> list[Verdict]:
    """One process's share: every `jobs`-th fault; the pipelines take turns."""
    signal.signal(signal.SIGALRM, _too_long)
    # What is meant to exhaust memory becomes a MemoryError here, and spares the machine.
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    logging.disable()  # a journal logs what it leaves out
    patient = Patient(Path(shutil.copytree(folder / "cache", folder / f"copy-{number}")))
    faults = [f for f in all_faults(patient.objects, args.flips, args.lies, args.seed) if args.only in f.name]
    mine = list(enumerate(faults))[number::jobs][: args.most]
    verdicts = []
    began = time.monotonic()
    for done, (index, fault) in enumerate(mine, start=1):
        signal.alarm(_SECONDS)
        verdicts.append(patient.examine(fault, args.pipelines[index // jobs % len(args.pipelines)]))
        signal.alarm(0)
        sys.stderr.writelines(f"{problem[:400]}\n" for problem in verdicts[-1].problems[:1])
        if done % 200 == 0 and number == 0:
            rate = done / (time.monotonic() - began)
            sys.stderr.write(f"{done:,} of {len(mine):,} faults of this process, {rate:.1f}/s\n")
    return verdicts


def main() -> int:
    """Damage, look, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--lies", type=int, default=2000, help="about how many of a hostile writer")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--most", type=int, default=None, help="faults of each process")
    parser.add_argument("--no-archive", dest="archive", action="store_false", help="leave that encoding out")
    args = parser.parse_args()
    args.pipelines = _installed_pipelines()
    began = time.monotonic()
    verdicts: list[Verdict] = []
    died = 0
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        build(Path(folder) / "cache", archive=args.archive)
        shares = [pool.submit(examine_all, Path(folder), number, args.jobs, args) for number in range(args.jobs)]
        for share in shares:
            try:
                verdicts += share.result()
            except BrokenProcessPool:
                died += 1
    print_table(verdicts)
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    first = {(verdict.fault, verdict.kind): verdict.problems for verdict in verdicts if verdict.problems}
    for found in first.values():
        print(f"{found[0][:400]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""))
    if died:
        print(f"{died} of {args.jobs} processes DIED")
    print(
        f"{len(verdicts):,} faults, {len(problems):,} problems, pipelines {', '.join(args.pipelines)}, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if problems or died else 0


def print_table(verdicts: Sequence[Verdict]) -> None:
    """Print how many faults of each sort were reported, refused, harmless or missed."""
    words = ("reported", "gone", "refused", "harmless", "MISSED")
    counted: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    raised: Counter[tuple[str, str]] = Counter()
    for verdict in verdicts:
        sort = verdict.fault.split(":")[0].split(",")[0], verdict.kind
        if verdict.fault.startswith("lie: bomb"):
            sort = "bomb", verdict.kind
        counted[sort][verdict.word] += 1
        raised[sort] += bool(verdict.raised)
    print(f"{'fault':12} {'object':22} {'faults':>7} {'read raises':>12} " + " ".join(f"{word:>9}" for word in words))
    for sort, words_of in sorted(counted.items()):
        numbers = " ".join(f"{words_of[word]:>9,}" for word in words)
        print(f"{sort[0]:12} {sort[1]:22} {words_of.total():>7,} {raised[sort]:>12,} {numbers}")
    total: Counter[str] = sum(counted.values(), Counter())
    numbers = " ".join(f"{total[word]:>9,}" for word in words)
    print(f"{'all':35} {total.total():>7,} {raised.total():>12,} {numbers}")


def _installed_pipelines() -> list[str]:
    found = []
    for name in PIPELINES:
        try:
            found.append(codec_pipeline(name))
        except PotstillError:
            sys.stderr.write(f"codec pipeline {name} is not installed: not examined\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
