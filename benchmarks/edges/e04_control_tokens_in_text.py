"""The text `the tag <eos> ends it`: whether it holds the control token, and what the command says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.corpora import byte_tokenizer


def main() -> None:
    """Ingest the text; print how often its row has the control id, and the end of the closing line."""
    from potstill.cache import Cache

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save("tokenizer.json")
    Path("a.txt").write_text("the tag <eos> ends it")
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", "a.txt", "--cache", "cache", "--corpus", "docs"]
    done = subprocess.run([*command, "--tokenizer", "."], capture_output=True, text=True, check=True)
    row = Cache.open("cache").corpus("docs").row(0).tolist()
    count = row.count(tokenizer.token_to_id("<eos>"))
    print(f"the control id {count} times; says …{done.stdout.strip()[-55:]}")


if __name__ == "__main__":
    main()
