"""A teacher whose tokenizer has two added tokens that the corpus's lacks, in ids that no row uses."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from potstill.cache import Cache
from potstill.clients.cli import main
from tests.support.tiny_models import make_tiny_llama


def run(*arguments: str) -> int:
    """Exit status of a command whose output goes to files."""
    with Path("out").open("w") as out, Path("err").open("w") as err:
        sys.stdout, sys.stderr = out, err
        try:
            return main(list(arguments))
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def fill() -> None:
    """Ingest with the plain tokenizer, prefill with the sibling's model."""
    model = make_tiny_llama(Path("model"), vocab_size=512)
    tokenizer = Tokenizer.from_file("model/tokenizer.json")
    tokenizer.save("plain.json")
    # The model's own table ends at 512: its last two ids become other tokens.
    text = Path("plain.json").read_text()
    last = [tokenizer.id_to_token(510), tokenizer.id_to_token(511)]
    Path("a.txt").write_text("A text. " * 20)
    run("ingest", "a.txt", "--cache", "c", "--corpus", "docs", "--tokenizer", "plain.json")
    sibling = Tokenizer.from_str(text)
    sibling.add_special_tokens([AddedToken(token, special=True) for token in last])
    sibling.save("model/tokenizer.json")
    if run("prefill", "--cache", "c", "--corpus", "docs", "--teacher", f"t={model}", "--top-k", "4"):
        refused = Path("err").read_text(errors="replace").splitlines()
        print(next(line for line in refused if line.startswith("spec_mismatch"))[:100])
    else:
        print(f"filled; ids that differ and no row uses: {Cache.open('c').targets('t', 'docs').unshared.text}")


if __name__ == "__main__":
    logging.disable()
    fill()
