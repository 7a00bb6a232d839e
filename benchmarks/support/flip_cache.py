"""A tiny cache with every kind of object in it, and everything that can be read from it, as probes.

Two corpora, two teachers: u8, f16, f32 and archive; top-k, draws, entropy, log Z and dense, some in a segment set of
their own; folded and not; annotations; a journal.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from potstill.cache import Cache, Fields
from potstill.cache.corpus.annotations import annotate
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.journal.journal import Journal, JournalPolicy
from potstill.cache.journal.segment import JournalRow, journal_records
from potstill.cache.store.record import read_record
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.types import Draws, Targets, TeacherIdentity
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.fakes import FakeTeacher


class View:
    """A freshly opened cache, each target set opened once."""

    def __init__(self, root: Path, pipeline: str | None = None) -> None:
        self.cache = Cache.open(root, pipeline=pipeline)
        self.corpus = self.cache.corpus
        self._targets: dict[tuple[str, str], TargetSet] = {}

    def targets(self, teacher: str, corpus: str) -> TargetSet:
        """A target set, opened at the first call."""
        if (teacher, corpus) not in self._targets:
            self._targets[teacher, corpus] = self.cache.targets(teacher, corpus)
        return self._targets[teacher, corpus]


Probe = Callable[[View], bytes]

_EVERYTHING = Fields(k=6, draws=5, seed=3, entropy=True, temperatures=(0.5, 2.0))
JOURNAL_POLICY = JournalPolicy(encoding="u8")
MISS = bytes(32)
"""Answer of a journal probe for a row that is not there; a row that is there gives 32 bytes, too."""


def build(root: Path, *, archive: bool = True) -> None:
    """Make the cache; without `archive` its place is taken by a second `u8`."""
    packed = "archive" if archive else "u8"
    texts = topics(2, characters=90)
    cache, a = make_corpus(root, name="a", texts=texts, row_tokens=30, shard_positions=90)
    _, b = make_corpus(root, name="b", texts=[text[::-1] for text in texts], row_tokens=30, shard_positions=90)
    for corpus in (a, b):
        for name in ("held-out", "split"):
            annotate(cache.root, corpus.annotated, name, np.arange(len(corpus)) % (2 + len(name)), {"source": name})
    _fill(cache, a, "one", Fields(k=6), "u8", fold=True)
    _fill(cache, a, "one", Fields(k=6, draws=5, seed=3, entropy=True), "u8", fold=False)
    _fill(cache, a, "two", Fields(k=4, dense=True, temperatures=(2.0,)), "f32", fold=False)
    _fill(cache, b, "one", Fields(k=5), "f16", fold=False)
    _fill(cache, b, "two", _EVERYTHING, packed, fold=True)
    _keep_in_journal(cache, a, "one")
    _keep_in_journal(cache, b, "two")


def probes(cache: Cache) -> dict[str, Probe]:
    """Everything that can be read, by name; each gives the bytes of its answer. Made from an intact cache."""
    found: dict[str, Probe] = {}
    for name in cache.corpora():
        corpus = cache.corpus(name)
        found |= {f"corpora/{name} {what}": probe for what, probe in _corpus_probes(corpus).items()}
        for teacher in cache.teachers(name):
            fields = cache.targets(teacher, name).fields
            found |= {f"targets/{teacher}/{name} {what}": p for what, p in _target_probes(teacher, name, fields)}
    rows = [cache.corpus(name).row(index) for name in cache.corpora() for index in range(4)]
    for path in journal_records(cache.root):
        record = read_record(cache.root, f"{path}.json", "journal")
        assert record is not None, "listed a moment ago"
        identity = TeacherIdentity.from_json(record["identity"])
        keys = [cache.corpus(name).key(row) for name in cache.corpora() for row in rows]
        found[f"journal {record['teacher']}"] = _journal_probe(str(record["teacher"]), identity, keys)
    return found


def _corpus_probes(corpus: Corpus) -> dict[str, Probe]:
    name, size = corpus.name, corpus.num_positions
    keys = [corpus.key(row) for row in corpus.rows(0, len(corpus))]
    return {
        "tokens": lambda view: view.corpus(name).tokens(0, size).tobytes(),
        "rows": lambda view: b"|".join(row.tobytes() for row in view.corpus(name).rows(0, len(view.corpus(name)))),
        "starts": lambda view: view.corpus(name).row_starts.tobytes() + view.corpus(name).shard_starts.tobytes(),
        "row_keys": lambda view: view.corpus(name).row_keys(0, len(view.corpus(name))).tobytes(),
        "find": lambda view: repr(view.corpus(name).find([*keys, b"0" * 16])).encode(),
        "tokenizer": lambda view: view.corpus(name).tokenizer.to_str().encode(),
        "held-out": lambda view: view.corpus(name).annotation("held-out").tobytes(),
        "split": lambda view: view.corpus(name).annotation("split").tobytes(),
    }


def _target_probes(teacher: str, corpus: str, fields: Fields) -> Iterator[tuple[str, Probe]]:
    # The fields are named: of a set whose record is gone, what is left would be less and not wrong.
    yield "all", lambda view: _bytes(_all(view, teacher, corpus, fields))
    yield (
        "rows",
        lambda view: b"".join(map(_bytes, view.targets(teacher, corpus).read_rows([5, 0, 3, 5], fields=fields))),
    )
    for part in _each_alone(fields):
        yield str(part), _part_probe(teacher, corpus, part)


def _all(view: View, teacher: str, corpus: str, fields: Fields) -> Targets:
    return view.targets(teacher, corpus).read(0, view.corpus(corpus).num_positions, fields=fields)


def _part_probe(teacher: str, corpus: str, part: Fields) -> Probe:
    return lambda view: _bytes(view.targets(teacher, corpus).read(60, 120, fields=part))


def _each_alone(fields: Fields) -> Iterator[Fields]:
    if fields.k:
        yield Fields(k=2)
    if fields.draws:
        yield Fields(k=0, draws=fields.draws, seed=fields.seed)
    if fields.entropy:
        yield Fields(k=0, entropy=True)
    if fields.temperatures:
        yield Fields(k=0, temperatures=fields.temperatures)
    if fields.dense:
        yield Fields(k=0, dense=True)


def _journal_probe(teacher: str, identity: TeacherIdentity, keys: list[bytes]) -> Probe:
    def probe(view: View) -> bytes:
        """Digest the answer for each key; a miss is no fault, as a damaged row is scored again."""
        journal = Journal(view.cache.root, teacher, identity, JOURNAL_POLICY)
        found = journal.find(keys, 4)
        return b"".join(MISS if each is None else hashlib.sha256(_bytes(each)).digest() for each in found)

    return probe


def _bytes(targets: Targets) -> bytes:
    parts: list[bytes] = []
    for name in targets.__dataclass_fields__:
        value = getattr(targets, name)
        arrays = (value.offsets, value.ids, value.counts) if isinstance(value, Draws) else (value,)
        parts += [
            b"-" if array is None else f"{array.dtype}{array.shape}".encode() + array.tobytes() for array in arrays
        ]
    return b"|".join(parts)


def _fill(cache: Cache, corpus: Corpus, teacher_name: str, fields: Fields, encoding: str, *, fold: bool) -> None:
    teacher = _teacher(corpus, teacher_name)
    targets = cache.plan_targets(teacher_name, corpus.name, teacher.identity, fields=fields, encoding=encoding)
    rows = targets.pilot_rows()
    if rows:
        targets.make_ranks(Targets.concat(_score(teacher, [corpus.row(row) for row in rows], fields)))
    for shard in np.flatnonzero(~targets.committed).tolist():
        first, last = (int(row) for row in corpus.shard_rows[shard : shard + 2])
        exact = Targets.concat(_score(teacher, corpus.rows(first, last), fields))
        assert targets.write_shard(shard, exact, teacher.provenance), "there is no other writer"
    if fold:
        targets.fold()


def _keep_in_journal(cache: Cache, corpus: Corpus, teacher_name: str) -> None:
    teacher = _teacher(corpus, teacher_name)
    journal = Journal(cache.root, teacher_name, teacher.identity, JOURNAL_POLICY)
    for first in (0, 2):
        rows = corpus.rows(first, first + 2)
        scored = _score(teacher, rows, Fields(k=4))
        journal.add(
            [
                JournalRow.of(corpus.key(row), row, exact, journal.encoding, journal.ranks)[0]
                for row, exact in zip(rows, scored, strict=True)
            ]
        )
        journal.flush(teacher.provenance)


def _teacher(corpus: Corpus, name: str) -> FakeTeacher:
    return teacher_for(corpus, model=f"fake-{name}")


def _score(teacher: FakeTeacher, rows: list[np.ndarray], fields: Fields) -> list[Targets]:
    return asyncio.run(teacher.score(rows, fields))
