"""One teacher's name, one identity in a cache root: whoever reads by name must get one model's numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from potstill.cache.errors import CorruptSegment, FormatError, SpecMismatch
from potstill.cache.store import Root
from potstill.cache.store.record import read_group_metadata
from potstill.cache.store.root import check_name
from potstill.cache.types import TeacherIdentity

# Specs are small objects: reading one from an object store is nearly all waiting.
_READ_AT_ONCE = 16


def stored_identities(root: Root, teacher: str) -> dict[str, TeacherIdentity]:
    """Read the identity of a teacher's targets, by corpus; targets whose record is damaged are left out.

    Raises:
        StoreError: the store does not answer.
    """
    corpora = root.folders(f"targets/{check_name('teacher', teacher)}")
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        found = list(pool.map(lambda corpus: _stored_identity(root, teacher, corpus), corpora))
    return {corpus: identity for corpus, identity in zip(corpora, found, strict=True) if identity is not None}


def require_one_identity(root: Root, teacher: str, identity: TeacherIdentity) -> None:
    """Check that the targets kept under a teacher's name are this teacher's, for whatever corpus.

    Raises:
        SpecMismatch: those of a corpus are another's. StoreError: the store does not answer.
    """
    for corpus, stored in stored_identities(root, teacher).items():
        differences = stored.source.differences(identity.source)
        if differences:
            raise SpecMismatch(
                f"the name {teacher!r} is another teacher's in this cache, whose targets corpus {corpus!r} has "
                f"({differences}); take another name, or `potstill delete` those targets"
            )


def _stored_identity(root: Root, teacher: str, corpus: str) -> TeacherIdentity | None:
    try:
        record = read_group_metadata(root, f"targets/{teacher}/{corpus}", "targets")
        return None if record is None else TeacherIdentity.from_json(record.get("identity"))
    except (FormatError, CorruptSegment):
        return None  # `inspect` and `verify` name it
