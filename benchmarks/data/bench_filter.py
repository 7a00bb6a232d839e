"""Shares of 20 MB of real text, in several kinds and languages, that each filter drops, with samples and speed.

    python -m benchmarks.data.bench_filter [--text FOLDER] [--megabytes 20] [--samples 1]

Manuals, documentation and source code are what a corpus of technical text is made of. The default rules are to leave
99% of its characters in, copies apart; the published ones are shown beside them. Planted copies, with words changed,
show which near copies are found. Exits 1 where the default rules drop more.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.data.real_text import fetch, write
from potstill.cache.text.duplicates import NearCopies
from potstill.cache.text.filter_report import FilterCounts
from potstill.cache.text.filtering import filter_files
from potstill.cache.text.known_hashes import NONE
from potstill.cache.text.rules import PRESETS, FilterPlan
from potstill.cache.text.words import normalised, word_hashes

AIM = 0.99
CHANGED = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="folder to unpack the packages in (default: a temporary one)")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--samples", type=int, default=1, help="samples of each rule")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.text or Path(temporary) / "packages"
        fetch(folder)
        files = write(folder, Path(temporary) / "text", int(args.megabytes * 1e6 / 6))
        by_default = {kind: _filtered(path, "default", args.samples) for kind, path in files.items()}
        for preset in PRESETS:
            print(f"\n{preset}")
            for kind, path in files.items():
                counts = by_default[kind] if preset == "default" else _filtered(path, preset, 0)
                _tell(kind, counts, args.samples if preset == "default" else 0)
        _tell_near(files)
    left = {kind: _by_rules(counts) for kind, counts in by_default.items()}
    print("\nleft by the default rules, copies apart:", {kind: f"{share:.1%}" for kind, share in left.items()})
    return 0 if min(left.values()) >= AIM else 1


def _filtered(path: Path, preset: str, samples: int) -> FilterCounts:
    out = path.with_name(f"{path.stem}-{preset}")
    began = time.process_time()
    plan = FilterPlan.read(preset)
    counts = filter_files([path], out, plan)
    if samples:
        speed = path.stat().st_size / 1e6 / (time.process_time() - began)
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {speed:.1f} MB/s of CPU time")
    return counts


def _by_rules(counts: FilterCounts) -> float:
    copies = sum(counts.dropped[name].characters for name in counts.dropped if name.endswith("_duplicate"))
    return counts.kept.characters / (counts.read.characters - copies)


def _tell(kind: str, counts: FilterCounts, samples: int) -> None:
    languages = {name: amount.documents for name, amount in counts.languages.items()}
    characters = counts.kept.characters / counts.read.characters
    told = f"kept {counts.kept.documents:,} of {counts.read.documents:,} documents, {characters:.1%} of the characters"
    print(f"  {kind}: {told}; {languages}")
    for name, found in sorted(counts.dropped.items(), key=lambda item: -item[1].documents):
        print(f"    {name}: {found.documents:,} ({found.alone:,} by it alone)")
        for sample in found.samples[:samples]:
            print(f"      {sample['value']} {' '.join(sample['text'].split())[:100]!r}")


def _tell_near(files: dict[str, Path]) -> None:
    """Copy documents with a share of their words changed, and count the copies that are found."""
    chance = random.Random(1)
    texts = [json.loads(line)["text"] for path in files.values() for line in path.read_text("utf-8").splitlines()[:60]]
    words = [normalised(text).split()[:2000] for text in texts]
    print("\nnear copies found, by the share of words that is changed:")
    for share in CHANGED:
        near = NearCopies()
        numbers = np.arange(2 * len(words), dtype=np.uint32)
        first = near.seen([word_hashes(" ".join(each)) for each in words], numbers[: len(words)])
        changed = [[word if chance.random() >= share else f"x{word}" for word in each] for each in words]
        again = near.seen([word_hashes(" ".join(each)) for each in changed], numbers[len(words) :])
        new = [found != NONE for before, found in zip(first, again, strict=True) if before == NONE]
        print(f"  {share:.0%}: {sum(new) / len(new):.1%} of {len(new)}")


if __name__ == "__main__":
    raise SystemExit(main())
