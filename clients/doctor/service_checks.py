"""Checks of a running service over HTTP: its wire version, clock, memory, room and access."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from potstill.cache.errors import Forbidden, NotFound, PotstillError, Unauthenticated
from potstill.cache.types import Fields
from potstill.cache.wire.scores import WIRE_VERSION
from potstill.clients.address import API_KEY_VARIABLE, checked_url, login_of
from potstill.clients.doctor.cache_checks import CorpusFacts, gib, store_findings, unreadable_finding
from potstill.clients.doctor.findings import Finding, Verdict, finding
from potstill.clients.doctor.teacher_checks import Probing, difference, probe_row
from potstill.clients.http_admin import HttpAdmin
from potstill.clients.http_teacher import HttpTeacher
from potstill.clients.retry import RetryPolicy

_SKEW_WARN = 2.0  # seconds; the Date header itself has whole ones
_SKEW_FAIL = 60.0
_TIMEOUT = 60.0
_PAGE_SECONDS = 10.0
_RETRY = RetryPolicy(attempts=2)
_ADMIN = "use a key with the role admin"


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """The answers of `/v1/teachers` and `/v1/doctor`; empty where there was none."""

    teachers: Sequence[Mapping[str, Any]]
    doctor: Mapping[str, Any]
    forbidden: str = ""
    """Reason for which `/v1/doctor` was not answered to this key; empty when it was, or when there is another cause."""

    @property
    def corpora(self) -> list[CorpusFacts]:
        """Facts of each corpus in the service's cache."""
        return [CorpusFacts.from_json(corpus) for corpus in (self.doctor.get("store") or {}).get("corpora", ())]


async def check_service(url: str, *, api_key: str | None = None) -> tuple[ServiceFacts, list[Finding]]:
    """Check the service itself; the teachers that it serves are checked one by one afterwards."""
    facts, findings = await _reach(url, api_key)
    has_key = bool(api_key or os.environ.get(API_KEY_VARIABLE) or login_of(url))
    url = checked_url(url)
    findings += [finding("clock", url, await _clock(url)), finding("access", url, await _access(url, has_key=has_key))]
    if facts.doctor:
        findings.append(finding("memory", url, _memory(facts.doctor)))
        findings += _store(url, facts.doctor)
        devices = {str((t.get("provenance") or {}).get("device", "")) for t in facts.teachers}
        told = f"only the host's memory was looked at (devices: {', '.join(sorted(devices - {''})) or 'none'})"
        findings.append(finding("GPU memory", url, Verdict("not run", told)))
    return facts, findings


async def check_cached(
    url: str, name: str, facts: ServiceFacts, probing: Probing, *, api_key: str | None = None
) -> Verdict:
    """Check that an answer through the cache is the teacher's own, both when it is kept and as a later hit."""
    if facts.forbidden:
        return Verdict("not run", f"only an admin's key may see what is kept: {facts.forbidden}", _ADMIN)
    if not facts.doctor:
        return Verdict("not run", "the service did not say what it keeps")
    kept = (facts.doctor.get("kept") or {}).get(name)
    if kept is None:
        return Verdict("not run", "nothing is kept of this teacher's answers")
    if kept.get("store_error"):
        return Verdict("warn", f"answers are not kept: {kept['store_error']}", "see 'write access' and 'room'")
    async with (
        HttpTeacher.open(url, name, api_key=api_key, store=False, timeout=_TIMEOUT, retry=_RETRY) as live,
        HttpTeacher.open(url, name, api_key=api_key, store=True, timeout=_TIMEOUT, retry=_RETRY) as cached,
    ):
        row = probe_row(live, probing)
        fields = Fields(k=min(int(kept["k"]), live.limits.max_top_k or live.identity.vocab_size))
        [exact] = await live.score([row], fields)
        [first] = await cached.score([row], fields)
        [again] = await cached.score([row], fields)
    moved, apart = difference(first, again), difference(first, exact)
    bound = float(kept["max_abs_error"]) + probing.tolerance
    if moved > 0:
        way_out = "two services keep answers of one teacher's name in this cache, or it is damaged: `potstill verify`"
        return Verdict("fail", f"a hit differs from the answer that was kept, by {moved:.2g} nats", way_out)
    told = f"kept and live differ by {apart:.2g} nats, of {bound:.2g} that {kept['encoding']} and the tolerance allow"
    return Verdict("ok", told) if apart <= bound else Verdict("fail", told, "the teacher moved since: drop its journal")


async def replica_count(url: str, name: str, *, api_key: str | None = None) -> int:
    """Fetch the number of running replicas of a teacher."""
    async with HttpAdmin.open(url, api_key=api_key) as admin:
        replicas = (await admin.replicas(name)).get("replicas")
    return replicas if isinstance(replicas, int) else 1


async def _reach(url: str, api_key: str | None) -> tuple[ServiceFacts, list[Finding]]:
    shown = checked_url(url)
    try:
        async with HttpAdmin.open(url, api_key=api_key) as admin:
            teachers = await admin.teachers()
            doctor, forbidden, version = await _inside(admin)
    except PotstillError as error:
        way_out = "start it with `potstill serve`, or give its --url"
        if isinstance(error, Unauthenticated):
            way_out = f"put a key into {API_KEY_VARIABLE}, or name its variable with --api-key-env"
        return ServiceFacts((), {}), [finding("service", shown, Verdict("fail", error.detail, way_out))]
    facts = ServiceFacts(teachers, doctor, forbidden)
    return facts, [finding("service", shown, _ready(facts)), finding("wire version", shown, version)]


async def _inside(admin: HttpAdmin) -> tuple[Mapping[str, Any], str, Verdict]:
    """Fetch `/v1/doctor`: its answer, why this key is forbidden to see it, and a verdict on the wire version."""
    try:
        doctor = await admin.doctor()
    except NotFound:
        told = "it has no /v1/doctor: it is older than this client"
        return {}, "", Verdict("fail", told, "upgrade the service")
    except PotstillError as error:
        forbidden = error.detail if isinstance(error, Forbidden) else ""
        told = f"what only the service itself can see was not looked at: {error.detail}"
        return {}, forbidden, Verdict("warn", told, _ADMIN)
    return doctor, "", _version(doctor)


def _ready(facts: ServiceFacts) -> Verdict:
    teachers = facts.teachers
    if not teachers:
        way_out = "add one: `potstill teachers add NAME=MODEL`"
        if facts.doctor.get("store") is not None:
            return Verdict("warn", "it serves no teacher, only what its cache has committed", way_out)
        return Verdict("fail", "it serves no teacher", way_out)
    failed = [
        f"{each.get('name')} has failed: {each.get('failure')}" for each in teachers if each.get("state") == "failed"
    ]
    if failed:
        return Verdict("fail", "; ".join(failed), "mend its model, then `potstill teachers` remove and add it")
    late = [
        f"{teacher.get('name')} is {teacher.get('state')}" for teacher in teachers if teacher.get("state") != "ready"
    ]
    if late:
        return Verdict("warn", "; ".join(late), "wait until it is ready, or see the service's log")
    return Verdict("ok", f"reached; ready: {', '.join(str(teacher.get('name')) for teacher in teachers)}")


def _version(doctor: Mapping[str, Any]) -> Verdict:
    theirs = doctor.get("wire_version")
    if theirs == WIRE_VERSION:
        return Verdict("ok", f"both speak wire version {WIRE_VERSION}")
    return Verdict("fail", f"the service speaks wire version {theirs}, this client {WIRE_VERSION}", "upgrade the older")


async def _clock(url: str) -> Verdict:
    reply = await _get(f"{url}/healthz")
    ours = datetime.now(UTC)
    if isinstance(reply, Verdict):
        return reply
    try:
        said = parsedate_to_datetime(reply.headers["date"])
    except (KeyError, ValueError):
        return Verdict("warn", "the service sends no date", "a proxy takes it away; compare the clocks by hand")
    # The header cuts off what is behind the second, so the service's clock is half a second ahead of it on average;
    # and it was written about half way through the call.
    skew = (said - ours + reply.elapsed / 2).total_seconds() + 0.5
    way_out = "set both clocks by NTP: leases of shards, ages of objects and logs go by them"
    told = f"the service's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
    if abs(skew) > _SKEW_FAIL:
        return Verdict("fail", told, way_out)
    return Verdict("warn", told, way_out) if abs(skew) > _SKEW_WARN else Verdict("ok", "clocks agree within 2 seconds")


async def _access(url: str, *, has_key: bool) -> Verdict:
    parsed = httpx.URL(url)
    if _is_loopback(parsed.host):
        return Verdict("ok", "on a loopback address")
    reply = await _get(f"{url}/v1/teachers")
    if isinstance(reply, Verdict):
        return reply
    if reply.status_code == httpx.codes.OK:
        way_out = "give it keys: `potstill keys add`, and name the file in [access]"
        return Verdict("fail", "it answers others without a key", way_out)
    if parsed.scheme == "http":
        told = "keys and rows go over the network in the clear" if has_key else "no TLS"
        return Verdict("warn", told, "serve it with TLS ([tls] certfile, keyfile) or behind a proxy that has it")
    return Verdict("ok", "keys are asked for, and the connection is encrypted")


async def _get(url: str) -> httpx.Response | Verdict:
    """Ask for a page without a key, like anybody; its body is not read. A verdict if nobody answers."""
    try:
        async with (
            asyncio.timeout(_PAGE_SECONDS),
            httpx.AsyncClient(timeout=_PAGE_SECONDS) as client,
            client.stream("GET", url) as reply,
        ):
            pass
    except (httpx.TransportError, TimeoutError) as error:
        return Verdict("not run", f"not reached: {error or type(error).__name__}")
    return reply


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _memory(doctor: Mapping[str, Any]) -> Verdict:
    memory = doctor.get("memory") or {}
    rss, available, admitted = (memory.get(key) for key in ("rss_bytes", "available_bytes", "admitted_bytes"))
    if available is None or admitted is None:
        return Verdict("not run", "the service's platform does not say how much memory is left")
    told = f"{gib(available)} are left, {gib(admitted)} may be let in at one time; it holds {gib(rss or 0)} now"
    way_out = (
        "lower max_engine_bytes, max_answer_bytes_in_flight, max_miss_bytes_in_flight or max_fills_running, "
        "or give it more memory"
    )
    # Requests that are let in rarely hold all they may: half of it is certain trouble, less than all of it a risk.
    if available < admitted // 2:
        return Verdict("fail", told, way_out)
    return Verdict("warn", told, way_out) if available < admitted else Verdict("ok", told)


def _store(url: str, doctor: Mapping[str, Any]) -> list[Finding]:
    store = doctor.get("store")
    if store is None:
        return [finding("write access", url, Verdict("not run", "the service has no cache"))]
    kept = (doctor.get("kept") or {}).values()
    may_grow = sum(max(int(of["quota_bytes"]) - int(of["journal_bytes"]), 0) for of in kept)
    where = f"{url} ({store.get('url')})"
    return [
        *store_findings(where, str(store.get("problem", "")), store.get("free_bytes"), may_grow),
        *(
            unreadable_finding(str(each["name"]), url, kind=str(each.get("kind", "")), detail=str(each["detail"]))
            for each in store.get("unreadable", ())
        ),
    ]
