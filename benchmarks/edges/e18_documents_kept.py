"""Three documents of 2, 1 and 3 rows, one an exact multiple of a row: the documents that their corpus knows."""

from __future__ import annotations

from pathlib import Path

from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest
from tests.support.corpora import byte_tokenizer


def main() -> None:
    """Ingest three files, and ask the corpus at which rows documents start."""
    for name, characters in (("a", 20), ("b", 7), ("c", 25)):
        Path(f"{name}.txt").write_text(name * characters, encoding="utf-8")
    cache = Cache.open("cache", mode="r+")
    sources = ["a.txt", "b.txt", "c.txt"]
    corpus = ingest(cache.root, "docs", sources, byte_tokenizer(), IngestPlan(row_tokens=10))
    if not hasattr(corpus, "document_rows"):
        print("the corpus does not know")
        return
    print(f"{corpus.num_documents} documents, which start at the rows {corpus.document_rows[:-1].tolist()}")


if __name__ == "__main__":
    main()
