"""The commits of one segment set: which shards have one, and what it says; one by one, or folded into a manifest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import NotCommitted
from potstill.cache.store.record import read_record
from potstill.cache.targets.commit import Commit, commit_bytes, commit_from_json, commit_name, shard_of_commit
from potstill.cache.targets.manifest import Manifest, fold
from potstill.cache.targets.spec_record import SpecRecord

# A commit is a small object: on an object store nearly all of the time is waiting.
_READ_AT_ONCE = 16


class Commits:
    """Read and create the commits of one segment set. Safe to share between threads.

    Commits never change, so one that was found is remembered.
    """

    def __init__(self, record: SpecRecord) -> None:
        self._record = record
        self._root = record.root
        self._path = record.path
        self._num_shards = record.corpus.num_shards
        self._known: dict[int, Commit] = {}
        self._manifest: Manifest | None = None

    @property
    def committed(self) -> NDArray[np.bool_]:
        """[S] which shards have a commit right now; a query of the store unless all have.

        Raises:
            SpecMismatch: another job made the set with another spec since it was planned; so does `of`.
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
        """Shards whose commit is not asked for again, though somebody may have deleted it since."""
        return list(self._known)

    def of(self, shard: int) -> Commit | None:
        """The commit of a shard, or None."""
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
        """The commit of a shard.

        Raises:
            NotCommitted: there is none.
        """
        commit = self.of(shard)
        if commit is None:
            raise NotCommitted(
                f"shard {shard} of corpus {self._record.corpus.name!r} has no targets in {self._path} yet; "
                f"run `potstill prefill` or `fill` with {self._record.spec.fill_options}"
            )
        return commit

    def all(self) -> list[Commit]:
        """Every commit there is, by shard."""
        manifest = self.manifest()
        if manifest is not None:
            return manifest.commits(0, self._num_shards)
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            found = list(pool.map(self.of, np.flatnonzero(self.committed).tolist()))
        return [commit for commit in found if commit is not None]

    def stored(self, shard: int) -> Commit | None:
        """A shard's commit as its own record has it right now, or None."""
        path = f"{self._path}/commits/{commit_name(shard)}"
        record = read_record(self._root, path, "commit")
        return None if record is None else commit_from_json(path, shard, record)

    def manifest(self) -> Manifest | None:
        """The folded commits, once all are folded."""
        if self._manifest is None:
            self._manifest = Manifest.open(self._root, self._path, self._num_shards)
        return self._manifest

    def create(self, commit: Commit) -> bool:
        """Make a segment the shard's targets; False when the shard has another commit already.

        Raises:
            StoreError: the store is full or cannot be written; the commit may have been created all the same.
        """
        won = self._root.create(f"{self._path}/commits/{commit_name(commit.shard)}", commit_bytes(commit))
        if won:
            self._known[commit.shard] = commit
        return won

    def fold(self) -> bool:
        """Fold the commits of a complete set into a manifest; whether this call did.

        The commits are read again, and looked at again when the manifest is there: one of them may be deleted and
        its shard filled anew at any time, and a manifest of what was there before would bring it back.

        Raises:
            StoreError: the store is full or cannot be written. CorruptSegment, FormatError: a damaged commit.
        """
        if self.manifest() is not None or not self.committed.all():
            return False
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
