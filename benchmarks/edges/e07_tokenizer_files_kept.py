"""A corpus made with a tokenizer that names BOS, EOS, PAD and a chat template: how many of the four it keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from potstill.cache import Cache
from tests.support.corpora import byte_tokenizer


def main() -> None:
    """Ingest with a tokenizer as `transformers` saves it, and ask the corpus."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names).save_pretrained("tokenizer")
    Path("text.txt").write_text("some text", encoding="utf-8")
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", "text.txt", "--cache", "cache"]
    subprocess.run([*command, "--corpus", "docs", "--tokenizer", "tokenizer"], check=True, capture_output=True)
    special = getattr(Cache.open("cache").corpus("docs"), "special_tokens", None)
    kept = [getattr(special, name, None) for name in ("bos", "eos", "pad", "chat_template")]
    print(f"{sum(each is not None for each in kept)} of 4 kept")


if __name__ == "__main__":
    main()
