"""Findings of `potstill doctor`, and the rule for a check that raises an error."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from potstill.cache.errors import PotstillError
from potstill.cache.printable import printable

Level: TypeAlias = Literal["ok", "warn", "fail", "not run"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a check in one line, and the way out of it when it is not well."""

    level: Level
    detail: str
    way_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A verdict with its check and its subject: a service, a teacher, a cache or a corpus."""

    check: str
    subject: str
    level: Level
    detail: str
    way_out: str = ""


async def found(check: str, subject: str, look: Awaitable[Verdict]) -> Finding:
    """Make one check. One of our own errors is a failure of that check alone, and the others go on."""
    try:
        verdict = await look
    except PotstillError as error:
        verdict = Verdict("fail", f"{error.kind}: {error.detail}", "mend what the line names, then look again")
    return finding(check, subject, verdict)


def finding(check: str, subject: str, verdict: Verdict) -> Finding:
    """A finding of a verdict that is there already."""
    texts = (check, subject, verdict.detail, verdict.way_out)
    check, subject, detail, way_out = map(printable, texts)  # a service may have put anything into them
    return Finding(check=check, subject=subject, level=verdict.level, detail=detail, way_out=way_out)
