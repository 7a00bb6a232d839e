"""Target sets to export, the commands, and Parquet files as other tools write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.targets.target_set import TargetSet
from tests.support.corpora import VOCAB, make_corpus, teacher_for, topics
from tests.support.fakes import FakeTeacher

K = 8


def make_small(root: Path) -> tuple[Cache, Corpus]:
    """Four shards."""
    return make_corpus(root, texts=topics(4), shard_positions=700)


def make_targets(root: Path, *, fields: Fields | None = None, encoding: str = "f32") -> TargetSet:
    cache, corpus = make_small(root)
    teacher = teacher_for(corpus)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=fields or Fields(k=K), encoding=encoding)
    fill_all(targets, teacher)
    return targets


def fill_all(targets: TargetSet, teacher: FakeTeacher) -> None:
    corpus = targets.corpus
    pilot = targets.pilot_rows()
    if pilot:
        targets.make_ranks(scored(teacher, corpus, pilot, targets.fields))
    for shard in range(corpus.num_shards):
        rows = range(int(corpus.shard_rows[shard]), int(corpus.shard_rows[shard + 1]))
        assert targets.write_shard(shard, scored(teacher, corpus, rows, targets.fields), teacher.provenance)


def scored(teacher: FakeTeacher, corpus: Corpus, rows: Any, want: Fields) -> Targets:
    return Targets.concat([teacher.targets(corpus.row(row), want) for row in rows])


def everything(targets: TargetSet) -> Targets:
    return targets.read(0, targets.corpus.num_positions)


def export(root: Path, folder: object, *more: object) -> list[object]:
    return ["export", root, "--corpus", "docs", "--teacher", "fake", "--to", folder, *more]


def take(folder: Path, root: Path, tokenizer: Path, *more: object) -> list[object]:
    where = ["--cache", root, "--corpus", "docs", "--teacher", "fake", "--tokenizer", tokenizer]
    return ["import", folder, *where, *more]


def foreign(path: Path, *, large: bool = False, **columns: Any) -> Path:
    """Three rows of five tokens with K=2, as another tool may write them; `columns` replaces some, by None none."""
    ids = [[[t % VOCAB, t % VOCAB + 1] for t in range(row * 5, row * 5 + 5)] for row in range(3)]
    made: dict[str, Any] = {
        "input_ids": [list(range(row * 5, row * 5 + 5)) for row in range(3)],
        "ids": ids,
        "logprobs": [[[-2.0, -0.5]] * 5 for _ in range(3)],
        **columns,
    }
    table = pa.table({name: values for name, values in made.items() if values is not None})
    if large:
        nested = {"ids": pa.large_list(pa.large_list(pa.int64())), "input_ids": pa.large_list(pa.int32())}
        table = pa.table({n: table[n].cast(nested.get(n, table[n].type)) for n in table.column_names})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return path


TEACHER = ("--model", "someone/model", "--vocab-size", VOCAB, "--encoding", "f32")
