"""Whether the root of a cache can be written right now, and how much room is left there."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import asdict, dataclass

from potstill.cache.errors import PotstillError
from potstill.cache.store.root import TEMPORARY, Root
from potstill.cache.types import JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProbe:
    """What writing, reading and removing one small object showed."""

    url: str
    problem: str
    """Why it did not work, in one line; empty when it did."""
    free_bytes: int | None
    """Of the file system of a local folder; None for an object store, which does not say."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        return asdict(self)


def probe_store(root: Root) -> StoreProbe:
    """Create, read and remove an object of a name used once, where temporary objects of a cache are."""
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
