"""Targets of the same weights under another model name: what renaming a model's folder leaves behind.

The model's name is part of a teacher's identity, so targets of before are another teacher's. Nothing here changes that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.store.record import read_group_metadata
from potstill.cache.store.root import Root
from potstill.cache.targets.target_set import segment_set_paths, target_set_paths
from potstill.cache.types import TeacherIdentity

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredIdentity:
    """Whose targets a target set is said to hold."""

    teacher: str
    corpus: str
    identity: TeacherIdentity


def stored_identities(root: Root) -> list[StoredIdentity]:
    """Of every target set of a cache; one whose record cannot be read is left to `verify`.

    Raises:
        StoreError: the store does not answer.
    """
    stored = (stored_identity(root, target_set) for target_set in target_set_paths(root))
    return [each for each in stored if each is not None]


def stored_identity(root: Root, target_set: str) -> StoredIdentity | None:
    """Of one of `target_set_paths`; None when its record cannot be read.

    Raises:
        StoreError: the store does not answer.
    """
    _, teacher, corpus = target_set.split("/")
    identity = _identity(root, target_set)
    return None if identity is None else StoredIdentity(teacher, corpus, identity)


def renamed_line(name: str, identity: TeacherIdentity, stored: Sequence[StoredIdentity]) -> str:
    """One line on targets of this teacher's weights and tokenizer under another model name; empty without any.

    A cache that has targets under both model names was filled under both on purpose: then only those under the
    teacher's own name are told of, which make its fills be refused.
    """
    if not _SHA256.fullmatch(identity.weights_sha256):
        return ""  # an import that does not know its weights has a word there
    same = [each for each in stored if _same_weights(each.identity, identity)]
    known = any(each.identity.model == identity.model for each in same)
    others = [each for each in same if each.identity.model != identity.model and (each.teacher == name or not known)]
    if not others:
        return ""
    # The teacher's own name first: that is the one whose targets were there yesterday. Then those that need the least.
    first = min(
        others,
        key=lambda each: (each.teacher != name, bool(_beside_name(identity, each.identity)), each.teacher, each.corpus),
    )
    where = ", ".join(
        each.corpus for each in others if (each.teacher, each.identity) == (first.teacher, first.identity)
    )
    return (
        f"teacher {name!r} is model {identity.model!r}, and the cache has targets of the same weights as model "
        f"{first.identity.model!r} (teacher {first.teacher!r}, corpora {where}): these are another teacher's to it and "
        f"are not used; to use them, serve the weights as {first.teacher!r} {_way_back(identity, first.identity)}, "
        "else fill under a new teacher name"
    )


def _way_back(now: TeacherIdentity, before: TeacherIdentity) -> str:
    """How what is served as `now` becomes the teacher `before`."""
    # A folder's name has no slash: that is a name on the hub.
    place = f"by the model name {before.model!r}" if "/" in before.model else f"from a folder named {before.model!r}"
    rest = _beside_name(now, before)
    return f"{place} and mend what differs beside the name (now != stored: {rest})" if rest else place


def _beside_name(now: TeacherIdentity, before: TeacherIdentity) -> str:
    return replace(now, model=before.model).differences(before)


def _same_weights(mine: TeacherIdentity, theirs: TeacherIdentity) -> bool:
    return (mine.weights_sha256, mine.tokenizer_sha256) == (theirs.weights_sha256, theirs.tokenizer_sha256)


def _identity(root: Root, target_set: str) -> TeacherIdentity | None:
    """All segment sets of a target set are one teacher's, so the first that can be read tells."""
    for path in segment_set_paths(root, target_set):
        try:
            record = read_group_metadata(root, path, "targets")
            if record is not None:
                return TeacherIdentity.from_json(record.get("identity"))
        except (CorruptSegment, FormatError):
            continue
    return None
