"""Mistral's tokenizers, which come with `mistral_common`, as a `tokenizer.json` with the same ids."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mistral_common
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from potstill.cache.corpus.tokenizer import byte_alphabet

_FOLDER = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = "tokenizer.model.v1"
TEKKEN = "tekken_240911.json"
_NORMAL, _CONTROL = 1, 3


def sentencepiece(name: str = SENTENCEPIECE) -> Tokenizer:
    """BPE by SentencePiece with byte fallback, which puts a space in front of texts; 32,000 ids or a few more."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString((_FOLDER / name).read_bytes())
    vocab = {piece.piece: token for token, piece in enumerate(model.pieces)}
    # A piece is made of two others as soon as its score is the best: the order of the scores is that of the merges.
    best_first = sorted((piece for piece in model.pieces if piece.type == _NORMAL), key=lambda piece: -piece.score)
    merges = [pair for piece in best_first for pair in _halves(piece.piece, vocab)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.piece for piece in model.pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in ["<unk>", *control]])
    return tokenizer


def tekken(name: str = TEKKEN) -> Tokenizer:
    """Byte-level BPE; 131,072 ids, of which the first 1,000 are special."""
    parts = json.loads((_FOLDER / name).read_text())
    config, char = parts["config"], {byte: char for char, byte in byte_alphabet().items()}
    num_special = config["default_num_special_tokens"]
    tokens = parts["vocab"][: config["default_vocab_size"] - num_special]
    ranked = ["".join(char[byte] for byte in base64.b64decode(each["token_bytes"])) for each in tokens]
    special = [each["token_str"] for each in parts.get("special_tokens") or ()]
    special += [f"<SPECIAL_{number}>" for number in range(len(special), num_special)]
    vocab = {token: number for number, token in enumerate([*special, *ranked])}
    merges = [pair for token in ranked for pair in _halves(token, vocab)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return tokenizer


def _halves(token: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make this one, those of the lowest ids first."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return sorted(
        (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
    )
