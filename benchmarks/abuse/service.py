"""The attacked process: `potstill serve` by some revision of the code, watched from outside."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.abuse.attack import CORPUS, TEACHER, VOCAB, Attack, Door, trusting
from potstill.cache import Fields, Targets
from tests.support.corpora import make_corpus, topics
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.certificate import make_certificate

STUDENT = "student"
"""Name of the key of callers who behave."""
HERE = Path(__file__).parents[2]
KEYS = {"trainer": "trainer", "batch": "batch", "admin": "admin", STUDENT: "trainer"}
"""Names of the keys, and their roles."""
MAX_ADDRESS_SPACE = 12 * 2**30
"""Bytes of address space that the attacked process may map, so that an attack cannot take the machine."""
PROBE_SECONDS = 0.05
LONGEST_PROBE = 120.0
PROBE_ADDRESS = "127.0.0.3"
"""The probes come from here, all else from 127.0.0.1."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Cost of an attack to the service."""

    seconds: float
    grown_bytes: int
    """Peak of the resident memory while it ran, less what was resident before."""
    kept_bytes: int
    """Resident memory five seconds after it, less what was resident before."""
    longest_probe: float
    """Seconds of the slowest `GET /healthz`; one that failed counts its time, and at least 10."""
    failed_probes: int
    died: bool


@contextlib.contextmanager
def code_of(revision: str) -> Iterator[Path]:
    """The tree of a revision of this repository, in a folder for the time being; "" is the tree of this file."""
    if not revision:
        yield HERE
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "-C", str(HERE), "worktree", "add", "-q", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "-C", str(HERE), "worktree", "remove", "--force", folder], check=True)


class Service:
    """A running service with one fake teacher and a corpus that is half filled."""

    def __init__(self, process: subprocess.Popen[str], door: Door, student_key: str, log: Path) -> None:
        self.door = door
        self.student_key = student_key
        self._log = log
        self._process = process
        self._watched = psutil.Process(process.pid)

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory that the process has now."""
        return int(self._watched.memory_info().rss)

    @property
    def died(self) -> bool:
        """True once the process has ended."""
        return self._process.poll() is not None

    @property
    def log_bytes(self) -> int:
        """Size of what it has written to its log."""
        return self._log.stat().st_size

    def reset_peak(self) -> None:
        """Begin to count the peak of memory anew."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    @property
    def peak_bytes(self) -> int:
        """Most bytes of memory since `reset_peak`."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def suffer(self, attack: Attack) -> Damage:
        """Let the attack run, and measure what it does."""
        self.reset_peak()
        before, begin = self.resident_bytes, time.monotonic()
        with probing(self.door) as probes:
            attack.run(self.door)
            seconds = time.monotonic() - begin
            time.sleep(5)
        died = self.died
        return Damage(
            seconds,
            0 if died else self.peak_bytes - before,
            0 if died else self.resident_bytes - before,
            max(probes.seconds),
            probes.failed,
            died,
        )


class Probes:
    """Times of `GET /healthz`, each on a new connection as a load balancer makes it, from an address of its own."""

    def __init__(self) -> None:
        self.seconds: list[float] = [0.0]
        self.errors: Counter[str] = Counter()

    @property
    def failed(self) -> int:
        """Probes without an answer."""
        return self.errors.total()

    def probe(self, door: Door) -> None:
        """Ask once."""
        begin = time.monotonic()
        try:
            # The bound of connections is one of an address: of the attackers' the service refuses the next one.
            transport = httpx.HTTPTransport(verify=trusting(), local_address=PROBE_ADDRESS)
            with httpx.Client(transport=transport, timeout=LONGEST_PROBE) as client:
                client.get(f"{door.url}/healthz").raise_for_status()
        except httpx.HTTPError as error:
            self.errors[f"{type(error).__name__}: {error}"] += 1
            begin = min(begin, time.monotonic() - 10)
        self.seconds.append(time.monotonic() - begin)


@contextlib.contextmanager
def probing(door: Door) -> Iterator[Probes]:
    """Probe in a thread until the block ends."""
    probes, done = Probes(), threading.Event()

    def go_on() -> None:
        while not done.wait(PROBE_SECONDS):
            probes.probe(door)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield probes
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def serving(attack: Attack, tree: Path, folder: Path) -> Iterator[Service]:
    """Serve by the code of `tree`, with the cache, keys and certificate in `folder`."""
    prepare(attack, folder / "cache")
    keys = make_keys(folder / "keys.toml") if attack.keys else dict.fromkeys(KEYS, "")
    config = folder / "serve.toml"
    config.write_text(settings(attack, folder))
    log = folder / "service.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POTSTILL_")}
    environment |= {"PYTHONPATH": str(tree), "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("served.py")), str(config)]
    limited = ["prlimit", f"--as={MAX_ADDRESS_SPACE}", *command]
    with log.open("w") as errors:
        process = subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"ready: https?://([^:/]+):(\d+) ", ready)
        assert found is not None, f"not ready: {ready!r} {log.read_text()}"
        door = Door(found[1], int(found[2]), attack.tls, keys["trainer"], keys["batch"], keys["admin"])
        yield Service(process, door, keys[STUDENT], log)
    finally:
        process.kill()
        process.communicate()


def prepare(attack: Attack, root: Path) -> None:
    """Make the cache: a corpus of text with half its shards filled, and what the attack wants beside it."""
    cache, corpus = make_corpus(root, name=CORPUS, texts=topics(16))
    teacher = FakeTeacher(fake_identity(vocab_size=VOCAB, tokenizer_sha256=corpus.tokenizer_sha256))
    targets = cache.plan_targets(TEACHER, CORPUS, teacher.identity, fields=Fields(k=16), encoding="f32")
    for shard in range(corpus.num_shards // 2):
        rows = corpus.rows(*corpus.shard_rows[shard : shard + 2].tolist())
        made = Targets.concat([teacher.targets(row, targets.fields) for row in rows])
        assert targets.write_shard(shard, made, teacher.provenance)
    if attack.prepare is not None:
        attack.prepare(root)


def make_keys(path: Path) -> dict[str, str]:
    """Keys by their names, made by the command that users have."""
    command = [sys.executable, "-m", "potstill.clients.cli", "keys", "add", "--file", str(path)]
    made = {}
    for name, role in KEYS.items():
        done = subprocess.run([*command, "--role", role, name], check=True, capture_output=True, text=True)
        made[name] = done.stdout.split()[-1]
    return made


def settings(attack: Attack, folder: Path) -> str:
    """The service's settings as TOML."""
    lines = [
        "port = 0",
        f'cache = "{folder}/cache"',
        "[[teachers]]",
        f'name = "{TEACHER}"',
        f'model = "fake://{VOCAB}"',
    ]
    if attack.keys:
        lines += ["[access]", f'keys_file = "{folder}/keys.toml"']
    if attack.tls:
        certfile, keyfile = make_certificate(folder)
        lines += ["[tls]", f'certfile = "{certfile}"', f'keyfile = "{keyfile}"']
    return "\n".join([*lines, attack.settings, ""])
