"""Documents ingested with two tokenizers, and a teacher's targets for one of them."""

from __future__ import annotations

import argparse
import inspect
import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from potstill.cache import Cache, Fields
from potstill.cache.corpus import Corpus, IngestPlan
from potstill.cache.corpus.ingest import ingest
from potstill.cache.projection import ProjectionPlan, ProjectionReport, project
from potstill.cache.targets.target_set import TargetSet
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.filled_caches import commit

NAMED = '{"bos_token": "<s>", "eos_token": "</s>"}'


def mixed_texts(num_bytes: int, *, prose: int = 1500) -> list[str]:
    """English, code, Chinese, Japanese, emoji, digits and spaces; each document has so much English, and code."""
    rng = np.random.default_rng(0)
    english = "\n\n".join(pydoc_data.topics.topics.values())
    code = "\n\n\n".join(inspect.getsource(module) for module in (inspect, json, argparse))
    emoji = ["\U0001f600", "\U0001f469\u200d\U0001f680", "\u2764\ufe0f", "\U0001f1eb\U0001f1f7", "\U0001f44d\U0001f3fd"]
    found: list[str] = []
    total = 0
    while total < num_bytes:
        at = int(rng.integers(0, len(english) - 2000)), int(rng.integers(0, len(code) - 2000))
        han = "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 60)))
        kana = "".join(map(chr, rng.integers(0x3041, 0x30FF, 60)))
        numbers = " ".join(str(each) for each in rng.integers(0, 10**9, 12).tolist())
        signs = "".join(rng.choice(emoji, 12))
        spaces = "".join(rng.choice([" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000"], 20))
        parts = [
            english[at[0] : at[0] + prose],
            code[at[1] : at[1] + prose],
            han,
            kana,
            numbers,
            signs,
            spaces,
            "caf\u00e9",
        ]
        # A tokenizer that puts a space in front of texts cannot tell whether there was one before.
        found.append(f"{len(found)}" + "".join(parts[i] for i in rng.permutation(len(parts)).tolist()))
        total += len(found[-1].encode())
    return found


def write(folder: Path, texts: Sequence[str]) -> Path:
    """One file a document, as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:06}.txt").write_bytes(text.encode())
    return folder


def ingested(
    cache: Cache,
    name: str,
    source: Path,
    tokenizer: Tokenizer,
    *,
    framed: str = "",
    row_tokens: int = 50,
    shard_positions: int = 400,
) -> Corpus:
    """A corpus; `framed` has `b` where documents begin with a token of their own, `e` where they end with one."""
    plan = IngestPlan(
        row_tokens=row_tokens, shard_positions=shard_positions, prepend_bos="b" in framed, append_eos="e" in framed
    )
    files = {"tokenizer_config.json": NAMED} if framed else {}
    return ingest(cache.root, name, [source], tokenizer, plan, tokenizer_files=files)


def taught(
    cache: Cache, corpus: Corpus, *, k: int = 16, encoding: str = "f32", missing: int = 0, vocab_size: int | None = None
) -> TargetSet:
    """Targets of the teacher `fake` for all but the last shards."""
    size = vocab_size or corpus.vocab_size
    teacher = FakeTeacher(fake_identity(vocab_size=size, tokenizer_sha256=corpus.tokenizer_sha256))
    planned = cache.plan_targets("fake", corpus.name, teacher.identity, fields=Fields(k=k), encoding=encoding)
    committed = planned.committed
    commit(planned, teacher, [shard for shard in range(corpus.num_shards - missing) if not committed[shard]])
    return cache.fresh().targets("fake", corpus.name)


def projected(cache: Cache, corpus: str = "students", source: str = "teachers") -> tuple[TargetSet, ProjectionReport]:
    """The student's targets."""
    report = project(cache.fresh(), ProjectionPlan(corpus=corpus, teacher="fake", source=source))
    return cache.fresh().targets("fake", corpus), report


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with tokens that begin and end documents."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
