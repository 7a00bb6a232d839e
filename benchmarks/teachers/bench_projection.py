"""Projection between three families of tokenizers: every byte accounted for, and positions a second.

A megabyte of English, code, Chinese, Japanese, emoji, digits and spaces is ingested with a byte-level BPE that is
trained on the spot, Mistral's SentencePiece (byte fallback) and Tekken. Each is compared with the text byte by byte,
then targets (a made-up top-64) of one are projected to another. Exits 1 when a byte is missing or mass is lost.

    python -m benchmarks.teachers.bench_projection [--bytes 1000000]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from potstill.cache import Cache, Fields, Provenance, Targets
from potstill.cache.corpus import Corpus, IngestPlan
from potstill.cache.corpus.ingest import ingest
from potstill.cache.projection import ProjectionPlan, project
from potstill.cache.projection.axis import TextAxis
from potstill.cache.projection.first_tokens import FirstTokens
from potstill.cache.projection.spelling import Spelling
from tests.support.fakes import fake_identity
from tests.support.tokenizers.mistral import sentencepiece, tekken
from tests.support.tokenizers.small import trained
from tests.support.tokenizers.two_corpora import mixed_texts, write

K = 64
MADE = Provenance(engine="bench", engine_version="", device="", capture_path="made up")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    args = parser.parse_args()
    texts = mixed_texts(args.bytes)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache.open(Path(folder) / "cache", mode="r+")
        source = write(Path(folder) / "text", texts)
        families = {"byte-level": trained(texts[:60], 8192), "SentencePiece": sentencepiece(), "Tekken": tekken()}
        corpora = {name: made_corpus(cache, name, source, each) for name, each in families.items()}
        wrong = sum(missing_bytes(name, corpus, texts) for name, corpus in corpora.items())
        for corpus in corpora.values():
            make_targets(cache, corpus)
        for teacher, student in itertools.permutations(corpora, 2):
            wrong += projected(cache, teacher, student)
    return int(wrong > 0)


def made_corpus(cache: Cache, name: str, source: Path, tokenizer: Tokenizer) -> Corpus:
    return ingest(cache.root, name, [source], tokenizer, IngestPlan(row_tokens=512, shard_positions=1 << 20))


def missing_bytes(name: str, corpus: Corpus, texts: list[str]) -> int:
    """Documents whose tokens do not spell their text."""
    began = time.perf_counter()
    axis = TextAxis(corpus, Spelling(corpus))
    seconds = time.perf_counter() - began
    wrong = sum(axis.text(document) != text.encode() for document, text in enumerate(texts))
    total = sum(len(text.encode()) for text in texts)
    print(f"{name}: {corpus.num_positions:,} tokens spell {total:,} bytes in {len(texts):,} documents, {wrong} wrongly")
    print(f"  read in {seconds:.1f} s", flush=True)
    return wrong


def make_targets(cache: Cache, corpus: Corpus) -> None:
    """Top-64 of falling mass; the next token is among them at most positions, in any place."""
    rng = np.random.default_rng(0)
    common = np.bincount(corpus.tokens(0, corpus.num_positions), minlength=corpus.vocab_size).argsort()[::-1][:4096]
    identity = fake_identity(vocab_size=corpus.vocab_size, tokenizer_sha256=corpus.tokenizer_sha256)
    planned = cache.plan_targets(f"of-{corpus.name}", corpus.name, identity, fields=Fields(k=K), encoding="f32")
    for shard in range(corpus.num_shards):
        start, stop = corpus.shard_starts[shard : shard + 2].tolist()
        count = stop - start
        ids = np.stack([rng.choice(common, K, replace=False) for _ in range(256)])[rng.integers(0, 256, count)]
        tokens = np.append(corpus.tokens(start, stop)[1:], 0)
        place = np.where((ids == tokens[:, None]).any(axis=1), K, rng.integers(0, K + 8, count))
        at = np.flatnonzero(place < K)
        ids[at, place[at]] = tokens[at]
        mass = -np.sort(-rng.gamma(0.2, size=(count, K + 1)) - 1e-9, axis=1)
        logprobs = np.log(mass / mass.sum(axis=1, keepdims=True)).astype(np.float32)
        found = np.where(ids == tokens[:, None], logprobs[:, :K], -np.inf).max(axis=1)
        label = np.where(np.isfinite(found), found, logprobs[:, K]).astype(np.float32)
        label[corpus.row_starts[1:] - 1 - start] = np.nan
        made = Targets(
            ids=ids.astype(np.uint32), logprobs=logprobs[:, :K], log_tail=logprobs[:, K], label_logprob=label
        )
        planned.write_shard(shard, made, MADE)


def projected(cache: Cache, teacher: str, student: str) -> int:
    """1 when mass is lost or made."""
    spellings = [Spelling(cache.corpus(name)) for name in (student, teacher)]
    began = time.perf_counter()
    FirstTokens.of(*spellings)
    mapped = time.perf_counter() - began
    reached = []
    began = time.perf_counter()
    plan = ProjectionPlan(corpus=student, teacher=f"of-{teacher}", source=teacher)
    report = project(cache.fresh(), plan, on_progress=lambda done, _: reached.append((done, time.process_time())))
    whole = time.perf_counter() - began
    targets = cache.fresh().targets(f"of-{teacher}", student)
    read = targets.read(0, targets.corpus.num_positions)
    mass = np.exp(read.logprobs.astype(np.float64)).sum(axis=1) + np.exp(read.log_tail.astype(np.float64))
    worst = float(np.abs(mass - 1).max())
    all_of = report.tally.to_json()["all"]
    (first, since), (last, until) = reached[0], reached[-1]
    rate = (last - first) / max(until - since, 1e-9)
    print(
        f"{teacher} -> {student}: {all_of['aligned']:.1%} aligned, {all_of['one_to_one']:.1%} one to one, "
        f"{all_of['agreeing']:.1%} agreeing; mass within {worst:.1e}; map {mapped:.1f} s, "
        f"{rate:,.0f} positions a second of CPU after the first block, {whole:.1f} s in all",
        flush=True,
    )
    for name, shares in report.tally.to_json().items():
        print("   ", f"{name:21}", *(f"{key} {value:,.3f}" for key, value in shares.items()))
    return int(worst > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
