"""The tokenizer of a published model, against the one that the corpus was made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from potstill.clients.cli import main
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, config_of, word_tokenizer, write_texts_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
CHAT = [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": "w5"}]


def published(folder: Path, *, pad: str | None) -> Path:
    """A run's model, of a corpus whose tokenizer has begin, end, template and maybe padding."""
    base = word_tokenizer()
    base.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    original = PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token="<s>", eos_token="</s>", pad_token=pad, padding_side="left"
    )
    original.chat_template = TEMPLATE
    original.save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text(" ".join(f"w{i % 47 + 1}" for i in range(400)))
    where = ["--cache", str(folder / "cache"), "--corpus", "docs", "--tokenizer", str(folder / "tokenizer")]
    assert not main(["ingest", str(folder / "text.txt"), *where, "--row-tokens", "12"])
    plain = {"steps": 1, "alpha": 0.0}
    student = {"config": {**STUDENT, "max_position_embeddings": 64}}
    train(config_of(folder / "cache", folder / "run", teachers=[], student=student, data={"held_out": 0}, train=plain))
    return folder / "run" / "model"


def test_the_published_tokenizer_is_the_original(tmp_path: Path) -> None:
    folder = published(tmp_path, pad="w7")
    original, found = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "tokenizer", folder))
    assert type(found) is type(original)
    assert found.special_tokens_map == original.special_tokens_map
    assert (found.padding_side, found.chat_template) == ("left", TEMPLATE)
    assert found.apply_chat_template(CHAT, tokenize=False) == original.apply_chat_template(CHAT, tokenize=False)
    assert found.apply_chat_template(CHAT) == original.apply_chat_template(CHAT)
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    for ids in (config, generation):
        assert [ids.bos_token_id, ids.eos_token_id, ids.pad_token_id] == [48, 49, 7]


def test_without_padding_only_generation_pads_with_the_end(tmp_path: Path) -> None:
    folder = published(tmp_path, pad=None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.pad_token is None
    assert model.config.pad_token_id is None
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == 49
    out = model.generate(**tokenizer("w1 w2", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
    assert out.shape[1] <= 6


def test_a_corpus_without_files_gives_the_bare_tokenizer(tmp_path: Path) -> None:
    root = write_texts_cache(tmp_path, [f"w{i} w{i + 1} w{i + 2}" for i in range(1, 40)])
    train(config_of(root, tmp_path / "run", teachers=[], train={"steps": 1, "alpha": 0.0}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.special_tokens_map == {}
    assert tokenizer("w1 w2")["input_ids"] == [1, 2]
