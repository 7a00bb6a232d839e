"""Claims: which job is at work on which shard, so that jobs share work instead of doing it twice.

Claims only save work. Correctness never rests on them: a shard's commit is created if absent, whoever holds its claim.

A claim is an object `<name>-<generation>.json` that is created if absent. Its owner renews it by creating the next
generation, another job takes it over in the same way, and the newest generation holds. A job may take over

- a claim that it has itself seen unchanged for the claim's time to live, by its own monotonic clock. The clocks of
  two machines are never compared;
- at once, the claim of a process of this machine that has died.

An owner that stalled and wakes up sees a newer generation than its own, and gives up.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from potstill.cache.errors import InvalidInput, StoreError
from potstill.cache.store.root import Root

_NAME = re.compile(r"(.+)-(\d{4,9})\.json")
# Renewals per time to live: one may fail, or be late, before others take the claim for abandoned.
_BEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process behind a claim, described so that other processes of its machine can see that it died."""

    job: str
    """Random id of one `Claims` object; never used again."""
    host: str
    place: str
    """Boot id and process namespace in which `pid` counts; empty where the system does not tell."""
    pid: int
    started: str
    """Start time of the process in the kernel's unit. A pid is used again, but not together with this."""

    @classmethod
    def this_process(cls) -> Self:
        """Describe the calling process, as a new job."""
        place = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        pid = os.getpid()
        return cls(job=uuid.uuid4().hex, host=socket.gethostname(), place=place, pid=pid, started=_started(pid) or "")

    def is_dead(self, place: str) -> bool:
        """Tell whether a process at `place` can be sure that this one has ended."""
        return bool(place) and self.place == place and _started(self.pid) != self.started


class Claim:
    """A name that this job holds. `lost` becomes True once another job was seen to hold it."""

    def __init__(self, claims: Claims, name: str, generation: int) -> None:
        self.name = name
        self.generation = generation
        self.lost = False
        self._claims = claims

    def still_mine(self) -> bool:
        """Ask the store whether no other job has taken the name over.

        Raises:
            StoreError: the store does not answer.
        """
        return self._claims.check(self)

    def release(self) -> None:
        """Give the name up, best effort: a claim that cannot be removed now expires."""
        self._claims.release(self)


@dataclass(frozen=True, slots=True)
class _Sighting:
    """The newest generation of another job's claim, and when this job first saw it."""

    generation: int
    version: str
    since: float
    ttl: float
    owner: Owner | None


Listing = Mapping[str, Mapping[int, str]]
"""Claims in the store: for each name, the version (`Root.versions`) of the object of each generation."""


class Claims:
    """The claims of one job below one path: a context manager that renews what it holds, and at its end releases it.

    `ttl` is in seconds.

    Raises:
        InvalidInput: a time to live that is not positive.
    """

    def __init__(
        self, root: Root, path: str, *, ttl: float = 120.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 < ttl < float("inf"):
            raise InvalidInput(f"--claim-seconds is {ttl}; it must be a positive number of seconds")
        self.ttl = ttl
        self.owner = Owner.this_process()
        self._root = root
        self._path = path
        self._clock = clock
        self._listing: Listing = {}
        self._others: dict[str, _Sighting] = {}
        self._held: dict[str, Claim] = {}
        # Renewing and checking must not see each other's half-made steps.
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="potstill-claims", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread that renews what is held."""
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything, best effort."""
        self._stop.set()
        self._heart.join()
        with self._lock:
            for claim in list(self._held.values()):
                claim.release()
        self._root.prune(self._path)

    def busy(self) -> set[str]:
        """Ask the store for the names that other jobs hold, as far as this job can know.

        Raises:
            StoreError: the store does not answer.
        """
        with self._lock:
            self._look()
            return {name for name, sighting in self._others.items() if self._holds(sighting)}

    def take(self, name: str) -> Claim | None:
        """Claim a name. None when another job held it at the last call of `busy`, or is faster now.

        Raises:
            StoreError: the store does not answer.
        """
        with self._lock:
            sighting = self._others.get(name)
            # A call that a cancelled caller no longer waits for may come after the end.
            if self._stop.is_set() or (sighting is not None and self._holds(sighting)):
                return None
            older = self._listing.get(name, {})
            claim = Claim(self, name, max(older, default=0) + 1)
            if not self._create(name, claim.generation):
                return None
            self._held[name] = claim
            # The listing may be older than an owner's renewals, whose earlier generations are gone by now.
            if not self.check(claim):
                self.release(claim)
                return None
            # Only now: the newest generation has to exist before older ones go, or a third job finds the name free.
            for generation in older:
                self._root.remove(self._object(name, generation))
            return claim

    def check(self, claim: Claim) -> bool:
        """See `Claim.still_mine`."""
        with self._lock:
            if not claim.lost:
                claim.lost = self._own_generation(claim, self._list()) is None
            return not claim.lost

    def release(self, claim: Claim) -> None:
        """See `Claim.release`."""
        with self._lock, suppress(StoreError):
            self._held.pop(claim.name, None)
            self._remove_own(self._object(claim.name, claim.generation))

    def renew(self) -> None:
        """Renew every claim that is held and was not lost.

        Raises:
            StoreError: the store does not answer; the claims that were not reached yet are not renewed.
        """
        with self._lock:
            held = [claim for claim in self._held.values() if not claim.lost]
            listing = self._list() if held else {}
            for claim in held:
                old, generation = self._object(claim.name, claim.generation), self._own_generation(claim, listing)
                if generation is None or not self._create(claim.name, generation + 1):
                    claim.lost = True
                else:
                    claim.generation = generation + 1
                self._remove_own(old)

    def clear(self) -> None:
        """Remove the claims that dead and silent jobs left, best effort; called when no work is left."""
        with self._lock, suppress(StoreError):
            busy = self.busy()
            for name, generations in self._listing.items():
                for generation in generations if name not in busy | self._held.keys() else ():
                    self._root.remove(self._object(name, generation))

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl / _BEATS):
            # A claim that is not renewed for too long may be taken over, which costs work and nothing else.
            with suppress(StoreError):
                self.renew()

    def _own_generation(self, claim: Claim, listing: Listing) -> int | None:
        """The newest generation if it is this job's; 0 if somebody removed them all; None if it is another job's."""
        generation = max(listing.get(claim.name, {}), default=0)
        if not generation:
            return 0
        found = self._root.get(self._object(claim.name, generation))
        return generation if found in (None, self._record()) else None

    def _holds(self, sighting: _Sighting) -> bool:
        if sighting.owner is not None and sighting.owner.is_dead(self.owner.place):
            return False
        return self._clock() - sighting.since < sighting.ttl

    def _look(self) -> None:
        """Note what changed among other jobs' claims since the last look."""
        self._listing = self._list()
        others = {}
        for name, versions in self._listing.items():
            held = self._held.get(name)
            if held is not None and not held.lost:
                continue
            generation = max(versions)
            version = versions[generation]
            known = self._others.get(name)
            if known is None or (known.generation, known.version) != (generation, version):
                data = self._root.get(self._object(name, generation))
                owner, ttl = _parse(data, self.ttl)
                known = _Sighting(generation, version, self._clock(), ttl, owner)
            others[name] = known
        self._others = others

    def _list(self) -> Listing:
        found: dict[str, dict[int, str]] = {}
        for name, version in self._root.versions(self._path).items():
            match = _NAME.fullmatch(name)
            if match:
                found.setdefault(match.group(1), {})[int(match.group(2))] = version
        return found

    def _create(self, name: str, generation: int) -> bool:
        # Not flushed to disk: after a power cut no owner is alive, and a lost claim costs nothing.
        return self._root.create(self._object(name, generation), self._record(), durable=False)

    def _record(self) -> bytes:
        return json.dumps({"kind": "claim", "ttl": self.ttl, **asdict(self.owner)}, sort_keys=True).encode()

    def _object(self, name: str, generation: int) -> str:
        return f"{self._path}/{name}-{generation:04d}.json"

    def _remove_own(self, path: str) -> None:
        # Another job's claim may have the same name by now.
        if self._root.get(path) == self._record():
            self._root.remove(path)


def time_to_live(data: bytes | None, otherwise: float) -> float:
    """Seconds after which a stored claim that nobody renews expires; `otherwise` where the record does not say."""
    return _parse(data, otherwise)[1]


def _parse(data: bytes | None, ttl: float) -> tuple[Owner | None, float]:
    """Owner and time to live of a stored claim; no owner and our own `ttl` where the record cannot be read."""
    try:
        record = json.loads(data or b"{}")
        found = float(record["ttl"])
        owner = Owner(**{name: record[name] for name in Owner.__slots__})
    except (ValueError, TypeError, KeyError):
        return None, ttl
    return owner, found if 0 < found < float("inf") else ttl


def _started(pid: int) -> str | None:
    """Start time of a process of this machine; None when there is none, or only a zombie."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    # Fields of proc(5): the second is the command in brackets, which may hold spaces and brackets itself. Behind it,
    # the first is the state (Z, X: dead) and the twentieth the start time.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]
