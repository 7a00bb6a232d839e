"""The commits of one segment set, stored one by one, and folded into a manifest when the set is complete."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import NotCommitted
from potstill.cache.store.publishing import publish
from potstill.cache.store.record import read_record
from potstill.cache.targets.commit import (
    Commit,
    commit_bytes,
    commit_from_json,
    commit_name,
    segment_path,
    shard_of_commit,
)
from potstill.cache.targets.manifest import Manifest, fold
from potstill.cache.targets.set_spec import SpecRecord

# Commits are small objects: reading one from an object store is nearly all waiting.
_READ_AT_ONCE = 16


class Commits:
    """Reads and creates the commits of one segment set; thread-safe. A commit never changes, so it is read once."""

    def __init__(self, record: SpecRecord) -> None:
        self._record = record
        self._root = record.root
        self._path = record.path
        self._num_shards = record.corpus.num_shards
        self._known: dict[int, Commit] = {}
        self._manifest: Manifest | None = None

    @property
    def committed(self) -> NDArray[np.bool_]:
        """Mask [S], True for a shard with a commit right now. It asks the store, unless the set is folded.

        Raises:
            SpecMismatch: another job made the set with another spec since it was planned; `of` raises it too.
        """
        done = np.zeros(self._num_shards, dtype=bool)
        if not self._record.is_begun():
            return done
        if self.manifest() is not None:
            return ~done
        for name in self._root.objects(f"{self._path}/commits"):
            shard = shard_of_commit(name)
            if shard is not None and shard < len(done):
                done[shard] = True
        return done

    @property
    def remembered(self) -> list[int]:
        """Shards whose commit is remembered and not read again, though somebody may have deleted it since."""
        return list(self._known)

    def of(self, shard: int) -> Commit | None:
        """Commit of a shard; None when there is none."""
        if shard not in self._known:
            if not self._record.is_begun():
                return None
            manifest = self.manifest()
            found = self.stored(shard) if manifest is None else manifest.commits(shard, shard + 1)[0]
            if found is None:
                return None
            self._known[shard] = found
        return self._known[shard]

    def require(self, shard: int) -> Commit:
        """Commit of a shard.

        Raises:
            NotCommitted: there is none.
        """
        commit = self.of(shard)
        if commit is None:
            raise NotCommitted(
                f"shard {shard} of corpus {self._record.corpus.name!r} has no targets in {self._path} yet; "
                f"run {self._record.spec.way_to_fill}"
            )
        return commit

    def all(self) -> list[Commit]:
        """All commits that there are, by shard."""
        manifest = self.manifest()
        if manifest is not None:
            return manifest.commits(0, self._num_shards)
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            found = list(pool.map(self.of, np.flatnonzero(self.committed).tolist()))
        return [commit for commit in found if commit is not None]

    def is_gone(self, shard: int) -> bool:
        """Tell whether the remembered commit is the shard's no more, and forget it; asked when a read fails."""
        known = self._known.pop(shard, None)
        self._manifest = None
        found = self.of(shard)
        return found is None or (known is not None and found.segment != known.segment)

    def stored(self, shard: int) -> Commit | None:
        """Read a shard's commit from its own record, not from memory or the manifest; None when there is none."""
        path = f"{self._path}/commits/{commit_name(shard)}"
        record = read_record(self._root, path, "commit")
        return None if record is None else commit_from_json(path, shard, record)

    def manifest(self) -> Manifest | None:
        """The manifest of all commits; None until they are folded."""
        if self._manifest is None:
            self._manifest = Manifest.open(self._root, self._path, self._num_shards)
        return self._manifest

    def create(self, commit: Commit) -> bool:
        """Create a commit, which makes its segment the shard's targets; False when the shard has another commit.

        Raises:
            StoreError: the store is full or cannot be written, and the commit may have been created all the same; or
                the segment was taken for garbage meanwhile, and the commit was withdrawn.
        """
        path, segment = f"{self._path}/commits/{commit_name(commit.shard)}", segment_path(self._path, commit.segment)
        manifest = f"{self._path}/manifest.json"

        def withdraw() -> None:
            # Another job may have folded it meanwhile, or be at it: see `fold`.
            for each in (manifest, path, manifest):
                self._root.remove(each)

        won = publish(self._root, path, commit_bytes(commit), segment, commit.objects, withdraw)
        if won:
            self._known[commit.shard] = commit
        return won

    def fold(self) -> bool:
        """Fold the commits of a complete set into a manifest; True when this call did.

        Raises:
            StoreError: the store is full or cannot be written. CorruptSegment, FormatError: a commit is damaged.
        """
        if self.manifest() is not None or not self.committed.all():
            return False
        # A commit may be deleted, and its shard filled anew, at any time; a manifest of the old commits would bring the
        # old one back. So all are read from the store, and compared once more when the manifest exists.
        before = self._root.versions(f"{self._path}/commits")
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            found = list(pool.map(self.stored, range(self._num_shards)))
        commits = [commit for commit in found if commit is not None]
        if len(commits) < len(found) or not fold(self._root, self._path, commits):
            return False
        if self._root.versions(f"{self._path}/commits") != before:
            self._root.remove(f"{self._path}/manifest.json")
            return False
        return True
