"""`GET /v1/doctor`: facts that only the service's own process can see, for `potstill doctor`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI

from potstill.cache.errors import StoreError
from potstill.cache.types import JSON
from potstill.cache.wire import scores as wire
from potstill.teacher_service.access import Role, allow
from potstill.teacher_service.hosting import Service

if TYPE_CHECKING:
    from potstill.cache.cache import Cache

_KIB = 1024


def add_doctor_routes(app: FastAPI, service: Service) -> None:
    """Add the route to the app. It writes, reads and removes one small object of the cache."""

    @app.get("/v1/doctor", dependencies=[Depends(allow(Role.ADMIN))])
    async def doctor() -> dict[str, Any]:
        """Look at what only the service can see (role admin): memory, the store, and what it keeps."""
        store = None if service.cache is None else await asyncio.to_thread(_store, service.cache)
        return {
            "wire_version": wire.WIRE_VERSION,
            "has_keys": service.access.keys is not None,
            "memory": {**memory(), "admitted_bytes": admitted_bytes(service)},
            "store": store,
            "kept": _kept(service),
        }


def admitted_bytes(service: Service) -> int:
    """Bytes that all work let in at one time may hold in this process, beside models and their caches."""
    limits = service.limits
    engines = max(len(service.teachers), 1) * limits.max_engine_bytes
    answers = limits.max_answer_bytes_in_flight + limits.max_miss_bytes_in_flight
    # A fill that rests until its teacher takes more lets another begin, and keeps what it has.
    fills = max(limits.max_fills_running, service.fills.num_begun) * limits.max_answer_bytes_in_flight
    return engines + limits.max_body_bytes_in_flight + answers + fills


def memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> dict[str, JSON]:
    """Memory of the process, and what it can still get of the machine or its container; null where nobody says."""
    status = _numbers(proc / "self" / "status")
    machine = _numbers(proc / "meminfo")
    available = None if "MemAvailable" not in machine else machine["MemAvailable"] * _KIB
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        inactive = _numbers(cgroup / "memory.stat").get("inactive_file", 0)  # given back before anybody is killed
        left = max(limit - used + inactive, 0)
        available = left if available is None else min(available, left)
    rss = None if "VmRSS" not in status else status["VmRSS"] * _KIB
    return {"rss_bytes": rss, "available_bytes": available, "cpus": os.cpu_count()}


def _store(cache: Cache) -> dict[str, JSON]:
    from potstill.cache.store.probe import probe_store  # noqa: PLC0415 -- zarr and obstore, only where there is a cache

    probe = probe_store(cache.root)
    corpora: list[JSON] = []
    unreadable: list[JSON] = []
    try:
        seen = cache.look_at_corpora(lambda name: _facts(cache, name))
        corpora += seen.found.values()
        unreadable += [
            {"name": name, "detail": error.detail, "kind": error.kind} for name, error in seen.unreadable.items()
        ]
    except StoreError as error:
        probe = replace(probe, problem=probe.problem or error.detail)
    return {**asdict(probe), "corpora": corpora, "unreadable": unreadable}


def _facts(cache: Cache, name: str) -> dict[str, JSON]:
    corpus = cache.corpus(name)
    return {
        "name": name,
        "tokenizer_sha256": corpus.tokenizer_sha256,
        "vocab_size": corpus.vocab_size,
        "teachers": list(cache.teachers(name)),
        "compared": list(cache.compared_teachers(name)),
    }


def _kept(service: Service) -> dict[str, JSON]:
    """Encoding, error and journal size of each teacher whose answers are kept."""
    from potstill.cache.encoding.logprobs import encoding_by_name  # noqa: PLC0415

    kept: dict[str, JSON] = {}
    for name, teacher in service.teachers.items():
        if teacher.cached is not None:
            policy = teacher.cached.policy
            kept[name] = {
                "max_abs_error": encoding_by_name(policy.encoding).max_abs_error,
                "encoding": policy.encoding,
                "k": policy.k,
                "quota_bytes": policy.quota_bytes,
                "journal_bytes": teacher.cached.journal_bytes,
                "store_error": teacher.cached.store_error,
            }
    return kept


def _numbers(path: Path) -> Mapping[str, int]:
    """The first number of each line, by the line's first word; empty where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = (line.replace(":", " ").split() for line in lines)
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The one number that a file holds, or None: `max` stands for no limit."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
