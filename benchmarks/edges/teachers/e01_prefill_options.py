"""A model whose tokenizer puts BOS before text: prefill with and without `prefix_ids`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from potstill.cache import Cache
from tests.support.tiny_models import END_OF_TEXT, make_tiny_llama


def potstill(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from potstill.clients.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)


def main() -> None:
    """Fill a corpus of one short text."""
    model = make_tiny_llama(Path("model"))
    tokenizer = Tokenizer.from_file("model/tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    tokenizer.save("model/tokenizer.json")
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**config, "bos_token": END_OF_TEXT}))
    Path("a.txt").write_text("The text of a corpus. " * 9)
    potstill("ingest", "a.txt", "--cache", "c", "--corpus", "docs", "--tokenizer", str(model))
    prefill = ["prefill", "--cache", "c", "--corpus", "docs", "--top-k", "4", "--teacher"]
    plain = potstill(*prefill, "plain=model")
    told = "warned" if "prefix_ids=[0]" in plain.stderr else "not warned"
    done = potstill(*prefill, "bos=model", "--option", "prefix_ids=[0]")
    if done.returncode:
        print(f"without: {told}; --option: {done.stderr.strip().splitlines()[-1]}"[:100])
    else:
        print(f"without: {told}; with: prefix_ids {list(Cache.open('c').targets('bos', 'docs').identity.prefix_ids)}")


if __name__ == "__main__":
    main()
