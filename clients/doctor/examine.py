"""All checks of a service, a cache and teachers, as `potstill doctor` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import httpx

from potstill.cache.entry_points import open_teacher
from potstill.cache.errors import PotstillError, StoreError
from potstill.cache.types import JSON
from potstill.clients.doctor.cache_checks import (
    LOOK_AT_STORE,
    CorpusFacts,
    check_stored,
    name_findings,
    one_name,
    store_findings,
    unreadable_finding,
    vocabulary_findings,
)
from potstill.clients.doctor.findings import Finding, Verdict, finding, found
from potstill.clients.doctor.service_checks import ServiceFacts, check_cached, check_service, replica_count
from potstill.clients.doctor.teacher_checks import Probing, check_teacher
from potstill.clients.http_teacher import HttpTeacher

if TYPE_CHECKING:
    from potstill.cache.cache import Cache

_TIMEOUT = 300.0  # seconds; a teacher may score its longest row, and others may be waiting before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """The service, cache and teachers to look at; each of them may be left out."""

    url: str | None = None
    cache: str | None = None
    teachers: Sequence[tuple[str, str]] = ()
    """Name, and model, path or URL, of each teacher that this process opens."""
    options: Mapping[str, Mapping[str, JSON]] = field(default_factory=dict)
    """Options of these teachers, by name."""
    api_key: str | None = None
    """API key for the service and for teachers behind its URL; without a service, for all teachers behind a URL.
    Others get that of `POTSTILL_API_KEY`, as from every client."""


@dataclass(frozen=True, slots=True)
class _OpenedCache:
    """A cache, and those of its corpora that can be read."""

    cache: Cache
    corpora: Sequence[CorpusFacts]


async def examine(patient: Patient, probing: Probing) -> list[Finding]:
    """Make every check; the findings come in the order in which things depend on each other."""
    findings: list[Finding] = []
    if patient.url is not None:
        findings += await _examine_service(patient.url, patient.api_key, probing)
    opened = None
    if patient.cache is not None:
        opened, seen = _open_cache(patient.cache)
        findings += seen
    for name, spec in patient.teachers:
        options = {**patient.options.get(name, {}), **_key_option(patient, spec)}
        findings += await _examine_opened(name, spec, options, opened, probing)
    return findings


def same_origin(url: str, other: str) -> bool:
    """Tell if two URLs have the same scheme, host and port, as the client that connects to them reads them."""
    try:
        ours, theirs = httpx.URL(url), httpx.URL(other)
    except httpx.InvalidURL:
        return False
    return (ours.scheme, ours.host, ours.port) == (theirs.scheme, theirs.host, theirs.port)


def _key_option(patient: Patient, spec: str) -> Mapping[str, JSON]:
    # The key may be an admin's of the service: another host that is only looked at must not learn it.
    shown = patient.url is None or same_origin(patient.url, spec)
    if patient.api_key is None or not shown or not spec.startswith(("http://", "https://")):
        return {}
    return {"api_key": patient.api_key}


async def _examine_service(url: str, api_key: str | None, probing: Probing) -> list[Finding]:
    facts, findings = await check_service(url, api_key=api_key)
    for described in facts.teachers:
        if described.get("state") == "ready":
            findings += await _examine_served(url, str(described.get("name")), facts, api_key, probing)
    return findings


async def _examine_served(
    url: str, name: str, facts: ServiceFacts, api_key: str | None, probing: Probing
) -> list[Finding]:
    findings = []
    try:
        async with HttpTeacher.open(url, name, api_key=api_key, store=False, timeout=_TIMEOUT) as teacher:
            if facts.doctor:
                findings += vocabulary_findings(name, teacher.identity, facts.corpora)
            # A row goes to any replica: four scores for each make it unlikely that one is never heard.
            rounds = max(probing.rounds, 4 * await replica_count(url, name, api_key=api_key))
            findings += await check_teacher(teacher, name, replace(probing, rounds=rounds))
    except PotstillError as error:
        findings.append(finding("teacher", name, Verdict("fail", error.detail, "see the service's log")))
        return findings
    cached = check_cached(url, name, facts, probing, api_key=api_key)
    return [*findings, await found("kept = live", name, cached)]


def _open_cache(root: str) -> tuple[_OpenedCache | None, list[Finding]]:
    from potstill.cache.cache import Cache  # noqa: PLC0415 -- zarr and obstore
    from potstill.cache.store.probe import probe_store  # noqa: PLC0415

    try:
        cache = Cache.open(root)
    except PotstillError as error:
        way_out = "`potstill ingest` makes a cache; name its folder or URL"
        return None, [finding("cache", root, Verdict("fail", error.detail, way_out))]
    probe = probe_store(cache.root)
    findings = store_findings(root, probe.problem, probe.free_bytes, None)
    try:
        seen = cache.look_at_corpora(partial(CorpusFacts.of, cache))
    except StoreError as error:
        way_out = f"the store did not list its corpora: {LOOK_AT_STORE}"
        return None, [*findings, finding("cache", root, Verdict("fail", error.detail, way_out))]
    findings += name_findings(cache)
    for name, why in seen.unreadable.items():
        findings.append(unreadable_finding(name, root, kind=why.kind, detail=why.detail))
    return _OpenedCache(cache, list(seen.found.values())), findings


async def _examine_opened(
    name: str, spec: str, options: Mapping[str, JSON], opened: _OpenedCache | None, probing: Probing
) -> list[Finding]:
    findings: list[Finding] = []
    async with AsyncExitStack() as stack:
        try:
            teacher = await stack.enter_async_context(open_teacher(spec, options=options))
        except PotstillError as error:
            way_out = "name a model folder, a model's name or http://host:port#NAME"
            return [finding("teacher", name, Verdict("fail", error.detail, way_out))]
        if opened is not None:
            findings += vocabulary_findings(name, teacher.identity, opened.corpora)
        findings += await check_teacher(teacher, name, probing)
        if opened is not None:
            findings.append(await one_name(opened.cache, name, teacher.identity))
            findings += await check_stored(opened.cache, name, teacher, probing.tolerance)
    return findings
