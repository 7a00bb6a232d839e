"""Which teachers of a service have targets of their weights under another model name in its cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from potstill.cache.errors import StoreError, Unavailable
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher

if TYPE_CHECKING:
    from potstill.cache.cache import Cache


@dataclass(frozen=True, slots=True)
class RenamedLook:
    """What was seen, and what could not be looked at."""

    lines: Mapping[str, str]
    """By teacher, a line of `potstill.cache.upkeep.renamed`; only of those that have one."""
    problem: str = ""
    """What was not looked at and why, in one line; empty when everything was."""


async def look_for_renamed(teachers: Iterable[HostedTeacher], cache: Cache) -> RenamedLook:
    """Look once, teacher by teacher; reads the record of every target set of the cache.

    Cancelled, it leaves at most one read behind, however many there are and however slow the store is.
    """
    from potstill.cache.targets.target_set import target_set_paths  # noqa: PLC0415
    from potstill.cache.upkeep.renamed import renamed_line, stored_identity  # noqa: PLC0415  zarr, only when a service runs

    try:
        paths = await asyncio.to_thread(target_set_paths, cache.root)
        read = [await asyncio.to_thread(stored_identity, cache.root, path) for path in paths]
    except StoreError as error:
        return RenamedLook({}, f"no teacher was looked at: {error.detail}")
    stored = [each for each in read if each is not None]
    lines, problems = {}, []
    for teacher in list(teachers):
        try:
            line = renamed_line(teacher.name, teacher.pool.identity, stored)
        except Unavailable as error:
            problems.append(error.detail)
            continue
        if line:
            lines[teacher.name] = line
    return RenamedLook(lines, "; ".join(problems))
