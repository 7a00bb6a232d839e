"""Control tokens that stand in text, against the tokenizer's own ways with them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from potstill.cache.corpus.control_tokens import ControlTokens, Disguised, in_words
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.tokenization import OVERLAP, WINDOW, encode_documents
from potstill.cache.errors import InvalidInput
from potstill.cache.store.root import Root
from tests.support.command_line import refused, run
from tests.support.corpora import byte_tokenizer, topics

CONTROL = ["<eos>", "<eos>x", "<s>", "<unk>"]
TEXT = "the tag <eos> ends it, <s>here<eos>xx</s> and <e" + "os> "


def byte_level() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def trained_bpe() -> Tokenizer:
    """Like Gemma's: control tokens and unknown ones are in the model's own vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(topics(5), trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL))
    return tokenizer


def unigram() -> Tokenizer:
    """Like T5's: its model itself would make a control token of the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=CONTROL, vocab_size=300)
    tokenizer.train_from_iterator(topics(5), trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(special_tokens=CONTROL, vocab_size=300)
    tokenizer.train_from_iterator(topics(5), trainer)
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, trained_bpe, unigram, word_piece)}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@each_tokenizer
def test_text_has_no_control_token_and_all_else_as_before(tokenizer: Tokenizer) -> None:
    disguised = Disguised(tokenizer, ControlTokens(tokenizer)).tokenizer
    plain = "".join(topics(3)) + " 漢 "
    assert disguised.encode(plain, add_special_tokens=False).ids == tokenizer.encode(plain).ids
    ids = disguised.encode(TEXT, add_special_tokens=False).ids
    control = {tokenizer.token_to_id(name) for name in CONTROL if name != "<unk>"}
    assert control & set(tokenizer.encode(TEXT).ids)
    assert not control & set(ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZERS["byte_level"], TOKENIZERS["trained_bpe"]])
def test_text_is_split_as_tokenizers_splits_special_tokens(tokenizer: Tokenizer) -> None:
    split = Tokenizer.from_str(tokenizer.to_str())
    split.encode_special_tokens = True
    disguised = Disguised(tokenizer, ControlTokens(tokenizer)).tokenizer
    for text in (TEXT, TEXT + "<think>", "漢<eos>"):
        assert disguised.encode(text, add_special_tokens=False).ids == split.encode(text).ids


@given(st.lists(st.sampled_from(["<eos>", "<eos>x", "<s>", "<", "eos>", "x", "<eo", "plain "]), max_size=30), st.data())
def test_control_tokens_are_seen_however_the_text_is_cut(words: list[str], data: st.DataObject) -> None:
    control = ControlTokens(TOKENIZERS["byte_level"])
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    seen: list[tuple[str, int]] = []
    whole: list[tuple[str, int]] = []
    assert list(control.seen(pieces, lambda name, at: seen.append((name, at)))) == pieces
    assert list(control.seen([text], lambda name, at: whole.append((name, at)))) == [text]
    assert seen == whole
    assert control.replaced(text, lambda name: f"[{len(name)}]").count("[") == len(whole)
    assert all(text.startswith(name, at) for name, at in whole)


def test_control_tokens_of_a_long_text_are_split_where_windows_meet() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    disguised = Disguised(tokenizer, ControlTokens(tokenizer)).tokenizer
    step = WINDOW - OVERLAP
    parts = [topics(1, characters=10**6)[0]] * 400
    text = "".join(parts)[: 3 * step]
    text = "".join(text[at : at + step - 2] + "<eos>" for at in range(0, len(text), step))
    (blocks,) = list(map(list, encode_documents(disguised, [[text]], "a text")))
    ids = [token for block in blocks for token in block.tolist()]
    assert ids == byte_tokenizer().encode(text).ids


def test_each_policy_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "a.jsonl"
    path.write_text(json.dumps({"text": "no tag"}) + "\n" + json.dumps({"text": "the tag <eos> ends it"}) + "\n")
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    eos = tokenizer.token_to_id("<eos>")
    command = ["ingest", path, "--cache", tmp_path / "c", "--tokenizer", tmp_path, "--special-tokens"]
    assert run(*command, "split", "--corpus", "split") == 0
    assert "; control tokens in text taken as text: 1 <eos>\n" in capsys.readouterr().out
    assert run(*command, "keep", "--corpus", "keep") == 0
    assert "; control tokens in text kept: 1 <eos>\n" in capsys.readouterr().out
    said = refused(capsys, *command, "refuse", "--corpus", "refuse")
    assert (
        "a.jsonl:2 has the control token '<eos>' at character 8, which --special-tokens split takes as text; mend it"
        in said
    )
    assert run(*command, "refuse", "--corpus", "skipped", "--skip-bad") == 0
    assert "from 1 document of 1 file; 0 duplicate rows; 1 bad record left out (fir" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("the tag <eos>")
    command[1] = tmp_path / "a.txt"
    said = refused(capsys, *command, "refuse", "--corpus", "file", "--skip-bad")
    assert "a.txt has the control token '<eos>' at character 8, which --special-tokens split takes as text; ta" in said
    cache = Root.open(tmp_path / "c")
    assert eos not in Corpus.open(cache, "split").row(1)
    assert list(Corpus.open(cache, "keep").row(1)).count(eos) == 1


def test_a_long_list_of_what_was_found_is_cut() -> None:
    assert in_words(Counter({"<a>": 1, "<b>": 5, "<c>": 2, "<d>": 1})) == "5 <b>, 2 <c>, 1 <a> and 1 others"


def test_a_model_that_merges_to_control_tokens_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<": 0, "s": 1, "<s": 2}, merges=[("<", "s")]))
    tokenizer.add_special_tokens(["<s"])
    with pytest.raises(InvalidInput, match="control tokens cannot be told from its text .*say --special-tokens keep"):
        Disguised(tokenizer, ControlTokens(tokenizer))
