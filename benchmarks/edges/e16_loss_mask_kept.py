"""Rows of which half is not to be learnt: the share of targets that their corpus says is to be learnt."""

from __future__ import annotations

import numpy as np

from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from tests.support.corpora import byte_tokenizer


def main() -> None:
    """Make a corpus of rows with a mask, as code without masks can: by its rows alone."""
    row, taught = np.arange(10, dtype=np.uint32), np.arange(10) >= 5
    try:
        from potstill.cache.corpus.spool import SourceRow
    except ImportError:
        rows = [row]
    else:
        rows = [SourceRow(row, taught=taught)]  # type: ignore[list-item]
    cache = Cache.open("cache", mode="r+")
    corpus = ingest_rows(cache.root, "docs", rows, byte_tokenizer(), IngestPlan())
    if not hasattr(corpus, "loss_mask"):
        print("100% of the targets are learnt: a corpus keeps no mask")
        return
    print(f"{corpus.loss_mask(0, corpus.num_positions).mean():.0%} of the targets are learnt")


if __name__ == "__main__":
    main()
