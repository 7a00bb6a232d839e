"""Check of everything that is published in a cache, group by group, in bounded memory.

A check reads every byte of a group and compares it with its record; when asked to it also decodes the group, so that
"intact" means readable. Groups that no record names are not published, and are not checked.

Shape legend:  S shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.annotations import list_annotations, open_annotation
from potstill.cache.corpus.seal import corpus_path
from potstill.cache.errors import (
    CorruptSegment,
    FormatError,
    InvalidInput,
    NotFound,
    PotstillError,
    SpecMismatch,
    StoreError,
)
from potstill.cache.journal import SegmentRecord
from potstill.cache.journal.segment import corrupt_journal_objects, journal_records
from potstill.cache.store import GroupReader, Reading, Root
from potstill.cache.store.groups import CHECKSUMS, objects_from_json
from potstill.cache.store.record import read_record
from potstill.cache.targets import SegmentSet
from potstill.cache.targets.commit import commit_name
from potstill.cache.targets.segment import SegmentRange, read_segment_ranges
from potstill.cache.targets.target_set import segment_set_paths, target_set_paths

# Errors that end the check of one group: the others are still worth checking. All but StoreError mean damage.
_FINDINGS = (CorruptSegment, FormatError, SpecMismatch, NotFound, InvalidInput, StoreError)
# A segment set remembers the commits it read, about 5 KB each; it is opened anew after so many shards.
_SHARDS_AT_ONCE = 1024
_DECODE_POSITIONS = 65_536
_DECODE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Checked:
    """Findings about one group, or about a record that should have been there."""

    path: str
    is_shard: bool
    problems: tuple[str, ...]
    """One line for each object that is not what was committed; none when the group is intact."""
    refill: str = ""
    """Options for the `potstill prefill` that scores the shard again; empty when it need not be deleted."""
    unreachable: str = ""
    """One line that says why the store did not give the group, whose bytes may be intact; empty when it did."""


@dataclass(frozen=True, slots=True)
class _Check:
    path: str
    run: Callable[[], list[str]]
    is_shard: bool = False
    refill: str = ""


def check_cache(root: Root, *, decode: bool = False, jobs: int = 1) -> Generator[Checked, None, None]:
    """Check what is published, `jobs` groups at a time; results come in the store's order.

    Closing the iterator waits for the groups that are being read, and starts no others. Where a listing fails, the last
    result says so, and what it would have listed is not checked.
    """
    checks = _checks(root, decode=decode)
    if jobs == 1:
        yield from map(_run, checks)
        return
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[Checked]] = deque()
        try:
            for check in checks:
                waiting.append(pool.submit(_run, check))
                # Bounded, as listing all of a large cache ahead would hold every check in memory.
                if len(waiting) > 2 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def count_checks(root: Root) -> int:
    """Approximate number of groups that `check_cache` will check, from listings alone."""
    corpora = root.folders("corpora")
    annotations = sum(len(root.objects(f"corpora/{name}/annotations")) for name in corpora)
    sets = [path for target_set in target_set_paths(root) for path in segment_set_paths(root, target_set)]
    shards = sum(len(root.objects(f"{path}/commits")) for path in sets)
    return len(corpora) + annotations + len(sets) + shards + len(journal_records(root))


def _run(check: _Check) -> Checked:
    try:
        problems = check.run()
        own = any(_is_of_shard(check.path, problem) for problem in problems)
    except StoreError as error:
        return Checked(check.path, check.is_shard, (), unreachable=_line(check.path, error))
    except _FINDINGS as error:
        problems = [_line(check.path, error)]
        own = _is_of_shard(check.path, error.detail)
    return Checked(check.path, check.is_shard, tuple(problems), check.refill if own else "")


def _is_of_shard(path: str, problem: str) -> bool:
    """Tell whether a problem is of the shard's own segment or commit, not of what all shards of the set share."""
    own = (path, f"{path.rpartition('/commits/')[0]}/segments/")
    return any(part in problem for part in own)


def _line(path: str, error: PotstillError) -> str:
    return error.detail if path in error.detail else f"{path}: {error.detail}"


def _checks(root: Root, *, decode: bool) -> Iterator[_Check]:
    try:
        yield from _listed_checks(root, decode=decode)
    except StoreError as error:
        yield _refused(root.url, error)


def _listed_checks(root: Root, *, decode: bool) -> Iterator[_Check]:
    for name in root.folders("corpora"):
        yield from _corpus_checks(root, name, decode=decode)
    for target_set in target_set_paths(root):
        for path in segment_set_paths(root, target_set):
            yield from _set_checks(root, path, decode=decode)
    for path in journal_records(root):
        yield _Check(path, partial(_check_journal, root, path, decode=decode))


def _corpus_checks(root: Root, name: str, *, decode: bool) -> Iterator[_Check]:
    path = corpus_path(name)
    try:
        corpus = Corpus.open(root, name)
    except NotFound:
        if root.objects(f"{path}/annotations"):
            yield _finding(path, f"{path}/zarr.json is missing, and the corpus has annotations")
        return  # without annotations it was never sealed, or its targets tell
    except _FINDINGS as error:
        yield _refused(path, error)
        return
    yield _Check(path, partial(_check_corpus, corpus, decode=decode))
    for annotation in list_annotations(root, corpus.annotated):
        yield _Check(
            f"{path}/annotations/{annotation}",
            partial(_check_annotation, root, corpus, annotation, decode=decode),
        )


def _set_checks(root: Root, path: str, *, decode: bool) -> Iterator[_Check]:
    """Checks of one segment set. It is a finding when a set with commits cannot be opened, for whatever reason."""
    commits = root.objects(f"{path}/commits")
    published = bool(commits) or root.get(f"{path}/manifest.json") is not None
    try:
        corpus = Corpus.open(root, path.split("/")[2])
        opened = SegmentSet.open(root, path, corpus, Reading.open())
        if opened is None:
            if published:
                yield _finding(path, f"{path}/zarr.json is missing, and there are commits")
            return
    except _FINDINGS as error:
        if published or not isinstance(error, NotFound):
            yield _refused(path, error)
        return
    strangers = sorted(set(commits) - {commit_name(shard) for shard in range(corpus.num_shards)})
    if strangers:
        yield _finding(path, *(f"{path}/commits/{name} is of no shard of the corpus" for name in strangers))
    yield _Check(path, partial(corrupt_shared_objects, opened))
    try:
        shards = np.flatnonzero(opened.commits.committed)
    except StoreError:
        raise
    except _FINDINGS:
        return  # the manifest; no shard can be read, and `corrupt_shared_objects` says why
    for start in range(0, len(shards), _SHARDS_AT_ONCE):
        yield from _shard_checks(root, path, corpus, shards[start : start + _SHARDS_AT_ONCE].tolist(), decode=decode)


def _shard_checks(root: Root, path: str, corpus: Corpus, shards: list[int], *, decode: bool) -> Iterator[_Check]:
    try:
        segments = SegmentSet.open(root, path, corpus, Reading.open())
    except _FINDINGS as error:
        yield _refused(path, error)
        return
    if segments is None:
        return  # deleted meanwhile
    for shard in shards:
        yield _Check(
            f"{path}/commits/{commit_name(shard)}",
            partial(corrupt_shard_objects, segments, shard, decode=decode),
            is_shard=True,
            refill=segments.spec.fill_options,
        )


def corrupt_shared_objects(segment_set: SegmentSet) -> list[str]:
    """Read every object of the rank table and the manifest; one line for each that is not what was recorded."""
    root, path, problems = segment_set.root, segment_set.path, []
    try:
        segment_set.ranks.read()
        manifest = segment_set.commits.manifest()
        problems += [] if manifest is None else manifest.corrupt_objects()
    except (CorruptSegment, FormatError) as error:
        problems.append(error.detail)
    record = None if problems else read_record(root, f"{path}/ranks.json", "ranks")
    if record is not None:
        reader = GroupReader(root, f"{path}/{record['group']}", objects_from_json(record["objects"]))
        problems += reader.corrupt_objects()
    return problems


def corrupt_shard_objects(segment_set: SegmentSet, shard: int, *, decode: bool = False) -> list[str]:
    """Read every object of a committed shard, and its commit; one line for each that is not what was committed.

    Raises:
        NotCommitted: the shard has no commit.
    """
    problems = []
    try:
        problems += segment_set.segments.group(shard).corrupt_objects()
        manifest = segment_set.commits.manifest()
        if manifest is not None and not manifest.holds(shard, segment_set.commits.stored(shard)):
            problems.append(f"{segment_set.path}/commits/{commit_name(shard)} is not the commit that the manifest has")
        segment_set.segments.open(shard)
    except (CorruptSegment, FormatError) as error:
        problems.append(error.detail)
    if decode and not problems:
        reader = segment_set.segments.reader(shard)
        low, high = (int(position) for position in segment_set.corpus.shard_starts[shard : shard + 2])
        for start in range(0, high - low, _DECODE_POSITIONS):
            wanted = SegmentRange(reader, start, min(start + _DECODE_POSITIONS, high - low))
            read_segment_ranges([wanted], segment_set.spec.fields)
    return problems


def _check_corpus(corpus: Corpus, *, decode: bool) -> list[str]:
    problems = corpus.corrupt_objects()
    if decode and not problems:
        assert len(corpus.shard_starts) == corpus.num_shards + 1, "checked as it was read"
        assert len(corpus.document_rows) == corpus.num_documents + 1, "checked as it was read"
        _ = corpus.special_tokens
        problems += _wrong_mask(corpus)
        for start in range(0, len(corpus), _DECODE_ROWS):
            problems += _wrong_keys(corpus, start, min(start + _DECODE_ROWS, len(corpus)))
    return problems


def _wrong_mask(corpus: Corpus) -> list[str]:
    """Check that the loss mask leaves as many targets as the seal says."""
    if not corpus.has_loss_mask:
        return []
    cuts = [*range(0, corpus.num_positions, _DECODE_POSITIONS), corpus.num_positions]
    taught = sum(int(corpus.loss_mask(start, stop).sum()) for start, stop in pairwise(cuts))
    if taught == corpus.spec.num_taught:
        return []
    return [
        f"{corpus_path(corpus.name)}: the loss mask leaves {taught} targets, the seal says {corpus.spec.num_taught}"
    ]


def _wrong_keys(corpus: Corpus, start: int, stop: int) -> list[str]:
    """Check that each row has the key of its tokens and is found by it; at most one line, for the first wrong row."""
    keys = [key.tobytes() for key in corpus.row_keys(start, stop)]
    found = corpus.find(keys)
    rows = corpus.rows(start, stop)
    wrong = [
        start + index
        for index, (key, at, row) in enumerate(zip(keys, found, rows, strict=True))
        if corpus.key(row) != key or at is None or at > start + index
    ]
    return [f"{corpus_path(corpus.name)}: row {wrong[0]} is not found by its key"] if wrong else []


def _check_annotation(root: Root, corpus: Corpus, name: str, *, decode: bool) -> list[str]:
    annotation = open_annotation(root, corpus.annotated, name)
    path = f"{corpus.annotated.folder}/{annotation.group}"
    problems = GroupReader(root, path, annotation.objects).corrupt_objects()
    if decode and not problems:
        corpus.annotation(name)
    return problems


def _check_journal(root: Root, path: str, *, decode: bool) -> list[str]:
    problems = corrupt_journal_objects(root, path)
    record = SegmentRecord.read(root, path) if decode and not problems else None
    if record is not None:
        reader = GroupReader(root, path, record.objects)
        for name in sorted({item.path.split("/")[0] for item in record.objects} - {"zarr.json", CHECKSUMS}):
            reader.read_all(name)
    return problems


def _finding(path: str, *problems: str) -> _Check:
    return _Check(path, lambda: list(problems))


def _refused(path: str, error: PotstillError) -> _Check:
    """A check that ends with the error that its group could not even be opened with."""

    def fail() -> list[str]:
        raise error

    return _Check(path, fail)
