"""A student of a corpus whose tokenizer has BOS, EOS, PAD and a chat template: which of the four it publishes."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from potstill.student_trainer.train.loop import train
from tests.support.corpora import byte_tokenizer
from tests.support.tiny_runs import config_of


def main() -> None:
    """Train a step without a teacher, and load the published folder."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names).save_pretrained("tokenizer")
    Path("texts").mkdir()
    for at in range(8):
        Path("texts", f"{at}.txt").write_text(f"some text {at}", encoding="utf-8")
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", "texts", "--cache", "cache", "--corpus", "docs"]
    subprocess.run([*command, "--tokenizer", "tokenizer", "--row-tokens", "12"], check=True, stdout=subprocess.DEVNULL)
    root, out = Path("cache").absolute(), Path("run").absolute()
    train(config_of(root, out, data={"held_out": 0}, teachers=[], train={"steps": 1, "alpha": 0.0}))
    published = AutoTokenizer.from_pretrained("run/model")
    found = [name for name in (*names, "chat_template") if getattr(published, name, None)]
    print(f"{len(found)} of 4: {', '.join(found) or 'none'}")


if __name__ == "__main__":
    main()
