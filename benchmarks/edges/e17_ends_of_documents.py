"""`--append-eos` and `--prepend-bos` on a document of three rows: where the two tokens are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.corpora import byte_tokenizer


def main() -> None:
    """Ingest 250 letters in rows of 100 tokens; print the rows that begin with BOS and end with EOS."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save("tokenizer.json")
    Path("tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    Path("a.txt").write_text("x" * 250)
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", "a.txt", "--cache", "cache", "--corpus", "docs"]
    command += ["--tokenizer", ".", "--row-tokens", "100", "--append-eos", "--prepend-bos"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.splitlines()[-1])
        return
    from potstill.cache import Cache

    rows = Cache.open("cache").corpus("docs").rows(0, 3)
    begin = [number for number, row in enumerate(rows) if row[0] == 256]
    end = [number for number, row in enumerate(rows) if row[-1] == 257]
    print(f"rows {begin} begin with BOS, rows {end} of {len(rows)} end with EOS")


if __name__ == "__main__":
    main()
