"""Make the small cache that a format version leaves behind: python -m tests.golden.make tests/golden/format-N.

Run once, when a format is new; the result is committed and read by every later version.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np

from potstill.cache import Cache, Fields
from potstill.cache.corpus.annotations import annotate
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.encoding.logprobs import ENCODINGS
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from tests.support.corpora import byte_tokenizer, write_texts
from tests.support.fakes import FakeTeacher, fake_identity

TEXTS = ["Potstill keeps what teachers know. " * 4, "Nothing published is ever rewritten."]
K = 8
LATER = Fields(k=0, draws=6, seed=1, entropy=True, temperatures=(2.0,), dense=True)
JOURNAL_ROW = np.arange(10, 30, dtype=np.uint32)


async def make(root: Path) -> None:
    cache = Cache.open(root, mode="r+")
    with tempfile.TemporaryDirectory() as folder:
        source = write_texts(Path(folder), TEXTS)
        plan = IngestPlan(row_tokens=40, shard_positions=90)
        corpus = ingest(cache.root, "docs", [source], byte_tokenizer(), plan)
    teacher = FakeTeacher(fake_identity(vocab_size=256, tokenizer_sha256=corpus.tokenizer_sha256))
    for name in ENCODINGS:
        targets = cache.plan_targets(name, "docs", teacher.identity, fields=Fields(k=K), encoding=name)
        await fill(teacher, targets, FillPlan())
        later = cache.plan_targets(name, "docs", teacher.identity, fields=LATER, encoding=name)
        await fill(teacher, later, FillPlan())
    annotate(cache.root, corpus.annotated, "even", np.arange(len(corpus)) % 2 == 0, {"source": "its row number"})
    async with CachedTeacher.open(teacher, name="asked", cache=cache, policy=KeepPolicy(k=K)) as cached:
        await cached.score([JOURNAL_ROW], Fields(k=K))


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1])))
