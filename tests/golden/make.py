"""Make the small cache that a format version leaves behind: python -m tests.golden.make tests/golden/format-N.

Run once, when a format is new; the result is committed and read by every later version.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from potstill.cache import Cache, Fields
from potstill.cache.corpus.annotations import annotate
from potstill.cache.corpus.ingest import IngestPlan, cut, ingest_rows
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from tests.support.corpora import byte_tokenizer
from tests.support.fakes import FakeTeacher, fake_identity

TEXTS = ["Potstill keeps what teachers know. " * 4, "Nothing published is ever rewritten."]
K = 8
ROW_TOKENS = 40
UNTAUGHT = 10
"""Targets at the start of each document that are not to be learnt."""
FILES = {
    "tokenizer_config.json": json.dumps({"eos_token": ".", "pad_token": {"content": "!"}}),
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
JOURNAL_ROW = np.arange(10, 30, dtype=np.uint32)


def documents() -> Iterator[SourceRow]:
    tokenizer = byte_tokenizer()
    for text in TEXTS:
        rows = list(cut([np.array(tokenizer.encode(text).ids, np.uint32)], ROW_TOKENS))
        for number, row in enumerate(rows):
            taught = np.arange(len(row)) >= UNTAUGHT if number == 0 else None
            yield SourceRow(row, taught=taught, ends_document=number == len(rows) - 1)


async def make(root: Path) -> None:
    cache = Cache.open(root, mode="r+")
    plan = IngestPlan(row_tokens=ROW_TOKENS, shard_positions=90)
    corpus = ingest_rows(cache.root, "docs", documents(), byte_tokenizer(), plan, tokenizer_files=FILES)
    teacher = FakeTeacher(fake_identity(vocab_size=256, tokenizer_sha256=corpus.tokenizer_sha256))
    # Targets are as format 2 left them, in every encoding and with every field.
    targets = cache.plan_targets("u8", "docs", teacher.identity, fields=Fields(k=K), encoding="u8")
    await fill(teacher, targets, FillPlan())
    annotate(cache.root, corpus.annotated, "even", np.arange(len(corpus)) % 2 == 0, {"source": "its row number"})
    async with CachedTeacher.open(teacher, name="asked", cache=cache, policy=KeepPolicy(k=K)) as cached:
        await cached.score([JOURNAL_ROW], Fields(k=K))


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1])))
