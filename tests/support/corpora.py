"""Small real corpora: a byte-level tokenizer without merges, text from the standard library."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from potstill.cache import Cache, Fields
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.sources import BadRecords, Field, Text, documents, list_sources
from potstill.cache.targets.target_set import TargetSet
from tests.support.fakes import FakeTeacher, fake_identity

VOCAB = 256


def byte_tokenizer() -> Tokenizer:
    """One token a byte; ids in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def topics(count: int, *, characters: int = 700) -> list[str]:
    """Real English technical prose, cut short."""
    return [text[:characters] for text in sorted(pydoc_data.topics.topics.values())[:count]]


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text)
    return folder


def texts_of(source: Path, text_field: str = "text", *, skip_bad: bool = False) -> list[str]:
    """The texts of all documents of a file or folder."""
    field = Field("text", text_field)
    bad = BadRecords(skip=skip_bad)
    files, _ = list_sources([source], field)
    found = [document for file in files for document in documents(file, field, bad, vocab_size=VOCAB)]
    return ["".join(document.pieces) for document in found if isinstance(document, Text)]


def make_corpus(
    root: Path,
    *,
    name: str = "docs",
    texts: list[str] | None = None,
    row_tokens: int = 50,
    shard_positions: int = 1000,
) -> tuple[Cache, Corpus]:
    """A cache at `root` with one corpus; the sources lie beside it."""
    source = write_texts(root.parent / f"{root.name}-{name}-text", texts or topics(8))
    cache = Cache.open(root, mode="r+")
    plan = IngestPlan(row_tokens=row_tokens, shard_positions=shard_positions)
    return cache, ingest(cache.root, name, [source], byte_tokenizer(), plan)


def teacher_for(corpus: Corpus, *, tokens_per_second: float = 0.0, model: str = "fake") -> FakeTeacher:
    identity = fake_identity(vocab_size=VOCAB, tokenizer_sha256=corpus.tokenizer_sha256, model=model)
    return FakeTeacher(identity, tokens_per_second=tokens_per_second)


def plan_targets(
    cache: Cache, teacher: FakeTeacher, *, k: int = 16, encoding: str = "u8", fields: Fields | None = None
) -> TargetSet:
    """`k` is used when there are no `fields`."""
    return cache.plan_targets("fake", "docs", teacher.identity, fields=fields or Fields(k=k), encoding=encoding)
