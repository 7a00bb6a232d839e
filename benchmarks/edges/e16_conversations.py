"""A conversation through the tokenizer's chat template: its ids against `transformers`, and what is to be learnt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.support.corpora import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": "What is a still?"}, {"role": "assistant", "content": "A vessel."}]


def main() -> None:
    """Ingest one conversation; print what became of it."""
    inner = byte_tokenizer()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(".")
    Path("a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    command = [
        sys.executable,
        "-m",
        "potstill.clients.cli",
        "ingest",
        "a.jsonl",
        "--cache",
        "cache",
        "--corpus",
        "docs",
    ]
    command += ["--tokenizer", ".", "--messages-field", "messages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.splitlines()[-1])
        return
    from potstill.cache import Cache

    corpus = Cache.open("cache").corpus("docs")
    row = corpus.row(0)
    same = row.tolist() == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    taught = row[1:][corpus.loss_mask(0, len(row))[:-1]].tolist()
    print(f"ids as of transformers: {same}; taught: {tokenizer.decode(taught)!r}")


if __name__ == "__main__":
    main()
