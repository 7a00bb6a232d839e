"""Draws the page at `/` in headless Chromium: a service with two teachers at work, and a corpus that is half filled.

python benchmarks/page_screenshot.py docs/page.png [--dark] [--seconds 60]
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from potstill.cache import Cache, Fields
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import Targets
from potstill.teacher_service.hosting.hosted_teacher import Keep
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.pools import hosted_pool
from tests.support.processes.browser import browsing, find_chromium
from tests.support.processes.servers import serving_teachers

HEIGHT = 640
SMALL, LARGE = "small", "large"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the teachers work before the picture")
    args = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium; Debian's package is called chromium")
    with TemporaryDirectory() as folder:
        cache, corpus = make_corpus(Path(folder) / "cache", texts=topics(40, characters=2400), shard_positions=800)
        fill(cache, corpus, SMALL, lambda shard: shard < 0.62 * corpus.num_shards)
        fill(cache, corpus, LARGE, lambda shard: shard % 7 < 3 and shard < 0.8 * corpus.num_shards)
        keep = Keep(cache, KeepPolicy())
        small = teacher_for(corpus, tokens_per_second=9000, model=model(SMALL))
        large = teacher_for(corpus, tokens_per_second=900, model=model(LARGE))
        teachers = [hosted_pool(SMALL, small, keep, replicas=2), hosted_pool(LARGE, large, keep, replicas=3, most=8)]
        with (
            serving_teachers(*teachers, cache=cache) as url,
            browsing(chromium, width=args.width, height=HEIGHT, dark=args.dark) as page,
        ):
            page.open(url)
            stop = threading.Event()
            callers = [threading.Thread(target=call, args=(url, t.name, stop)) for t in teachers for _ in range(3)]
            for caller in callers:
                caller.start()
            time.sleep(args.seconds)
            page.screenshot(args.path)
            stop.set()
            for caller in callers:
                caller.join()
            assert not page.trouble, page.trouble
    print(f"{args.path}: {args.path.stat().st_size} bytes")


def model(name: str) -> str:
    return f"fake/{name}"


def fill(cache: Cache, corpus: Corpus, name: str, wanted: Callable[[int], bool]) -> None:
    teacher = teacher_for(corpus, model=model(name))
    targets = cache.plan_targets(name, "docs", teacher.identity, fields=Fields(k=16))
    for shard in range(corpus.num_shards):
        if wanted(shard):
            rows = corpus.rows(int(corpus.shard_rows[shard]), int(corpus.shard_rows[shard + 1]))
            scored = Targets.concat([teacher.distribution(row, 16) for row in rows])
            targets.write_shard(shard, scored, teacher.provenance)


def call(url: str, teacher: str, stop: threading.Event) -> None:
    """Ask for rows, some of them again and again, at a rate that swings."""
    chosen = random.Random(threading.get_ident())
    begin = time.monotonic()
    with httpx.Client(timeout=60) as client:
        while not stop.is_set():
            some = [[chosen.randrange(256) for _ in range(64)] for _ in range(8)]
            often = [[which % 256] * 48 for which in chosen.sample(range(40), 12)]
            client.post(f"{url}/v1/teachers/{teacher}/score", json={"rows": some + often, "fields": {"k": 16}})
            time.sleep(0.05 + 0.25 * (int(time.monotonic() - begin) // 6 % 3))


if __name__ == "__main__":
    main()
