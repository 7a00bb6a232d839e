"""Items of benchmarks found in real text: recall, with words edited too, false finds, speed, and memory of the index.

    python -m benchmarks.data.bench_contamination [--text FOLDER] [--megabytes 20] [--items 10000]

Items are sentences of 14 to 60 words of Perl's manuals; the text is of all other kinds, where what is found without
being planted is a false find (or a sentence that both have). Exits 1 where an item that was planted as it is is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.data.real_text import fetch, kinds, write
from potstill.cache.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.text.benchmark_items import Item
from potstill.cache.text.contamination import look_for, open_index
from potstill.cache.text.item_index import ItemIndex
from potstill.cache.text.words import normalised, word_hashes

EDITED = (0.0, 0.02, 0.05, 0.1, 0.2)
PLANTED = 500
_SENTENCE = re.compile(r"[A-Z][^.!?]{60,400}[.!?]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="folder to unpack the packages in (default: a temporary one)")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--items", type=int, default=10_000)
    args = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.text or Path(temporary) / "packages"
        fetch(folder)
        questions = sentences(folder, args.items)
        files = write(folder, Path(temporary) / "text", int(args.megabytes * 1e6 / 5))
        files.pop("Perl's manuals")
        texts = [json.loads(line)["text"] for path in files.values() for line in path.open(encoding="utf-8")]
        index = ItemIndex([Item("perl", number, question) for number, question in enumerate(questions)])
        false_finds(texts, index)
        exact = recall(texts, questions, index, chance)
        whole(Path(temporary), list(files.values()), questions)
        memory(questions, chance)
    return 0 if exact == 1.0 else 1


def sentences(folder: Path, count: int) -> list[str]:
    """Different sentences of enough words, of which no run of 13 is in another."""
    found: dict[str, None] = {}
    for text in kinds(folder)["Perl's manuals"]():
        for sentence in _SENTENCE.findall(" ".join(text.split())):
            if 14 <= len(normalised(sentence).split()) <= 60:
                found[sentence] = None
    some = list(found)
    random.Random(1).shuffle(some)
    return some[:count]


def false_finds(texts: list[str], index: ItemIndex) -> None:
    began = time.process_time()
    matches = [(number, match) for number, text in enumerate(texts) for match in index.find(hashed(text))]
    seconds, size = time.process_time() - began, sum(len(text.encode()) for text in texts) / 1e6
    print(f"{size:.1f} MB of text: {size / seconds:.1f} MB/s of CPU time, {len(index.items):,} items in the index")
    false = 0
    for number, match in matches:
        run = normalised(texts[number]).split()[match.start : match.stop]
        false += " ".join(run) not in normalised(index.items[match.item].question)
    items = {match.item for _, match in matches}
    print(
        f"found without being planted: {len(items)} of {len(index.items):,} items in "
        f"{len({number for number, _ in matches})} of {len(texts):,} documents; {false} of {len(matches)} runs are not "
        "in both, word by word"
    )
    for item in sorted(items)[:5]:
        print(f"  {index.items[item].question[:100]!r}")


def hashed(text: str) -> NDArray[np.uint64]:
    return word_hashes(normalised(text))


def recall(texts: list[str], questions: list[str], index: ItemIndex, chance: random.Random) -> float:
    """Share of items found that were planted as they are; prints those of edited ones."""
    exact = 0.0
    print("planted items found, by the share of words that is edited:")
    for share in EDITED:
        found = 0
        for number in range(PLANTED):
            text = texts[number % len(texts)]
            at = chance.randrange(len(text))
            planted = f"{text[:at]} {' '.join(edited(questions[number].split(), share, chance))} {text[at:]}"
            window = planted[max(0, at - 5000) : at + 5000]
            found += any(match.item == number for match in index.find(hashed(window)))
        exact = found / PLANTED if share == 0 else exact
        print(f"  {share:.0%}: {found / PLANTED:.1%}")
    return exact


def edited(words: list[str], share: float, chance: random.Random) -> Iterator[str]:
    """Words of which each is changed, left out or doubled with this probability in all."""
    for word in words:
        if chance.random() >= share:
            yield word
        else:
            yield from chance.choice([[f"x{word}"], [], [word, word]])


def whole(folder: Path, files: list[Path], questions: list[str]) -> None:
    """Time the search in a corpus, whose rows are decoded; the tokenizer is trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_384, initial_alphabet=alphabet, show_progress=False)
    texts = (json.loads(line)["text"][:20_000] for path in files for line in path.open(encoding="utf-8"))
    tokenizer.train_from_iterator((text for number, text in enumerate(texts) if number % 8 == 0), trainer)
    cache = Cache.open(folder / "cache", mode="r+")
    corpus = ingest(cache.root, "docs", files, tokenizer, IngestPlan(row_tokens=512))
    items = folder / "perl.jsonl"
    items.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions), encoding="utf-8")
    index = open_index([items])
    size = sum(path.stat().st_size for path in files) / 1e6
    began, cpu = time.perf_counter(), time.process_time()
    found = look_for(corpus, [items], index)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"a corpus of {len(corpus):,} rows: {size / wall:.1f} MB/s, {size / cpu:.1f} MB/s of CPU time; "
        f"{found.benchmarks[0].found} items in {int(found.rows.sum())} rows"
    )


def memory(questions: list[str], chance: random.Random) -> None:
    """Memory of indexes of more and more items, of words drawn at random so that no two are alike."""
    words = sorted({word for question in questions for word in question.split()})
    print("memory of the index:")
    for count in (1_000, 10_000, 100_000):
        items = [Item("b", n, " ".join(chance.choices(words, k=40))) for n in range(count)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index = ItemIndex(items)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        size = index.num_bytes
        print(
            f"  {count:,} items, {index.num_runs:,} runs: {size / 2**20:.1f} MiB, {size / index.num_runs:.0f} bytes a "
            f"run; peak {grown:.0f} MiB more while it was made"
        )


if __name__ == "__main__":
    raise SystemExit(main())
