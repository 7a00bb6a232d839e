"""Comparison of a segment set's stored objects with what its records say of them."""

from __future__ import annotations

from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.targets.commit import commit_name
from potstill.cache.targets.segment_set import SegmentSet


def corrupt_shard_objects(segment_set: SegmentSet, shard: int) -> list[str]:
    """Read every object of a committed shard, and its commit; one line for each that is not what was committed.

    Raises:
        NotCommitted: the shard has no commit.
    """
    found = []
    try:
        found += segment_set.segments.group(shard).corrupt_objects()
        manifest = segment_set.commits.manifest()
        if manifest is not None and not manifest.holds(shard, segment_set.commits.stored(shard)):
            found.append(f"{segment_set.path}/commits/{commit_name(shard)} is not the commit that the manifest has")
        segment_set.segments.open(shard)
    except (CorruptSegment, FormatError) as error:
        found.append(error.detail)
    return found


def corrupt_shared_objects(segment_set: SegmentSet) -> list[str]:
    """Read every object of the rank table and the manifest; one line for each that is not what was recorded."""
    found = []
    try:
        segment_set.ranks.forget()
        segment_set.ranks.read()
        manifest = segment_set.commits.manifest()
        found += [] if manifest is None else manifest.corrupt_objects()
    except (CorruptSegment, FormatError) as error:
        found.append(error.detail)
    return found
