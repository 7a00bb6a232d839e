"""Publication of groups by their records, and the removal of groups that no record names.

A writer that pauses for a day between its last write and its record may find its group taken for garbage. Each side
leaves its mark before it looks at the other's, so at least one sees the other whatever the order:

    writer     creates the record, then looks at the group; where it is buried or broken, it withdraws the record
    collector  buries the group under a tombstone, then looks at the record; where it names the group, it digs it up
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from potstill.cache.errors import StoreError
from potstill.cache.store.record import record_bytes
from potstill.cache.store.root import Root, StoredObject

TOMBSTONE = "tombstone.json"
"""Name of the object in a group that says that somebody is about to remove it."""


def loss(root: Root, group: str, objects: Iterable[StoredObject]) -> str | None:
    """Name the first object of a group that is gone or has another size, or its tombstone; None when it is whole."""
    found = root.sizes(group)
    if TOMBSTONE in found:
        return f"{group}/{TOMBSTONE} says that it is being removed"
    gone = next((item.path for item in objects if found.get(item.path) != item.size), None)
    return None if gone is None else f"{group}/{gone} was removed"


def publish(
    root: Root,
    record: str,
    data: bytes,
    group: str,
    objects: Iterable[StoredObject],
    withdraw: Callable[[], None] | None = None,
) -> bool:
    """Create the record that makes a group exist; False when there is another record, and the group is the caller's.

    `withdraw` takes the record back, by default by its removal.

    Raises:
        StoreError: the store is full or cannot be written, and the record may exist all the same; or the group was
            removed before its record was there, and the record was withdrawn.
    """
    if not root.create(record, data):
        return False
    problem = loss(root, group, objects)
    if problem is None:
        return True
    # Somebody may have removed it already, and another writer's stand there now.
    if root.get(record) == data:
        if withdraw is None:
            root.remove(record)
        else:
            withdraw()
    raise StoreError(f"{problem} before {record} was there, which was withdrawn; run it again")


def remove_unnamed(root: Root, group: str, record: str, is_named: Callable[[], bool]) -> bool:
    """Remove a group that `record` may come to name at any moment; False when it does.

    Raises:
        StoreError: the store cannot be written; what is left stays buried.
    """
    root.create(f"{group}/{TOMBSTONE}", record_bytes("tombstone", {"record": record}), durable=False)
    if is_named():
        root.remove(f"{group}/{TOMBSTONE}")
        return False
    # The tombstone goes last: as long as anything is there, a writer that looks sees that the rest is not, or why.
    for name in root.folders(group):
        root.delete(f"{group}/{name}")
    root.delete(group)
    return True
