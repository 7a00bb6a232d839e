"""A folder with `d.jsonl`, `more.jsonl.gz` and `more.json`: how many of the three are ingested."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

from tests.support.corpora import byte_tokenizer


def main() -> None:
    """Ingest the folder; print the number of its files in the corpus."""
    folder = Path("data")
    folder.mkdir()
    line = json.dumps({"text": "a document"}) + "\n"
    (folder / "d.jsonl").write_text(line)
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (folder / "more.json").write_text(f"[{line}]")
    byte_tokenizer().save("tokenizer.json")
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", "data", "--cache", "cache", "--corpus", "docs"]
    done = subprocess.run([*command, "--tokenizer", "."], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.splitlines()[-1][:100])
        return
    from potstill.cache import Cache

    print(f"{len(Cache.open('cache').corpus('docs').spec.sources)} of 3 files, exit status 0")


if __name__ == "__main__":
    main()
