"""A probe of a cache's root: can it be written right now, and how much room is left there?"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass

from potstill.cache.errors import PotstillError
from potstill.cache.store.local_files import TEMPORARY
from potstill.cache.store.root import Root


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProbe:
    """The outcome of writing, reading and removing one small object."""

    url: str
    problem: str
    """One line that says why it did not work; empty when it did."""
    free_bytes: int | None
    """Free bytes of a local folder's file system; None for an object store, which does not tell."""


def probe_store(root: Root) -> StoreProbe:
    """Create, read and remove an object under a fresh name among the cache's temporary objects."""
    path = f"{TEMPORARY}/{uuid.uuid4().hex}"
    content = path.encode()
    problem = ""
    try:
        root.create(path, content)
        if root.get(path) != content:
            problem = "what was written is not what is read back"
        root.remove(path)
    except PotstillError as error:
        problem = error.detail
    return StoreProbe(url=root.url, problem=problem, free_bytes=_free_bytes(root))


def _free_bytes(root: Root) -> int | None:
    try:
        return None if root.folder is None else shutil.disk_usage(root.folder).free
    except OSError:
        return None
