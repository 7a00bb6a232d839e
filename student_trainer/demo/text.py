"""Real text that is on every machine: the help topics of the standard library, technical English prose."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer


def write_text(folder: Path, tokenizer: Tokenizer, tokens: int) -> None:
    """Write topics, one file each in order of name, up to about `tokens` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for name in sorted(topics):
        if written >= tokens:
            break
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
        written += len(tokenizer.encode(topics[name], add_special_tokens=False).ids)
