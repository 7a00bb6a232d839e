"""Targets of the same weights under another model name: what renaming a model's folder leaves behind.

The model's name is part of a teacher's identity, so targets of before are another teacher's. Nothing here changes that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import CorruptSegment, FormatError
from cache.record import read_group_metadata
from cache.store import Root
from cache.targets import segment_set_paths, target_set_paths
from cache.types import TeacherIdentity

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
    found = []
    for target_set in target_set_paths(root):
        _, teacher, corpus = target_set.split("/")
        identity = _identity(root, target_set)
        if identity is not None:
            found.append(StoredIdentity(teacher, corpus, identity))
    return found


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
    # The teacher's own name first: that is the one whose targets were there yesterday.
    first = min(others, key=lambda each: (each.teacher != name, each.teacher, each.corpus))
    where = ", ".join(
        each.corpus for each in others if (each.teacher, each.identity.model) == (first.teacher, first.identity.model)
    )
    return (
        f"teacher {name!r} is model {identity.model!r}, and the cache has targets of the same weights as model "
        f"{first.identity.model!r} (teacher {first.teacher!r}, corpora {where}): these are another teacher's to it and "
        f"are not used; to use them, serve the weights as {first.teacher!r} from a folder named "
        f"{first.identity.model!r}, else fill under a new teacher name"
    )


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
