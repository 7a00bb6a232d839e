"""A tokenizer as the bytes that its ids spell, and the first id that it gives to a piece of a text.

Shape legend:  V ids, N pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.tokenizer import byte_alphabet, is_byte_level, num_ids, token_table
from potstill.cache.errors import UnsupportedField

NONE = -1
"""Stands where there is no id."""
_PROBES = (
    ("a b  c\n\n\td ", "changes spaces"),
    ("Ab aB \u00c9\u00e9", "changes letters, as to lower case"),
    ("\ufb01 \u2460 \u00bd \uff21", "normalises characters, as NFKC does"),
    ("\u4e16 \U0001f600 \u0e01\x01", "has no bytes for a character that it does not know (no byte fallback)"),
)
"""Texts that must come back byte by byte, and what a tokenizer does that does not give one back. None is for NFC, in
which texts mostly are: a document that it changes is found when it is compared with the other corpus."""


class Spelling:
    """Spelling of the ids of a corpus's tokenizer.

    Raises:
        UnsupportedField: they do not spell a text byte by byte.
    """

    def __init__(self, corpus: Corpus) -> None:
        tokenizer = corpus.tokenizer
        self.corpus = corpus.name
        self.sha256 = corpus.tokenizer_sha256
        self.bytes_of = [b""] * num_ids(tokenizer)
        """Bytes of each id; those of a special token are the text that stands for it."""
        self.special: dict[str, int] = {}
        """Ids of special tokens by their texts."""
        for token, (data, special) in token_table(tokenizer).items():
            self.bytes_of[token] = data
            if special:
                self.special[data.decode()] = token
        named = corpus.special_tokens
        self.bos = NONE if named.bos is None else named.bos
        """The token that begins documents where they have one; it spells nothing there. So does `eos` at their end."""
        self.eos = NONE if named.eos is None else named.eos
        self._alphabet = {byte: char for char, byte in byte_alphabet().items()} if is_byte_level(tokenizer) else None
        self._inside = _plain(_without_prefix(json.loads(tokenizer.to_str())))
        self._at_start = _plain(json.loads(tokenizer.to_str()))
        self._require_exact()
        self.begins_with_space = self._spelt(self._at_start, "a") == b" a"
        """True where a space that is not in the text is put in front of each document."""

    def lengths(self) -> NDArray[np.int64]:
        """Count the bytes of each id, [V]."""
        return np.array([len(data) for data in self.bytes_of], dtype=np.int64)

    def first_ids(self, pieces: Sequence[bytes], *, at_start: bool = False) -> NDArray[np.int64]:
        """Find the first id of each piece of text, [N]; `NONE` where the piece does not begin with it.

        Args:
            pieces: any bytes, as those of a token that is a part of a character.
            at_start: True for pieces that begin a document.
        """
        tokenizer = self._at_start if at_start else self._inside
        whole = [(i, piece.decode()) for i, piece in enumerate(pieces) if piece and _is_text(piece)]
        encoded = tokenizer.encode_batch_fast([text for _, text in whole], add_special_tokens=False)
        found = np.full(len(pieces), NONE, dtype=np.int64)
        for (i, _), each in zip(whole, encoded, strict=True):
            found[i] = each.ids[0] if each.ids else NONE
        for i, piece in enumerate(pieces):
            if piece and not _is_text(piece):
                found[i] = self._first_of_cut(piece)
            if found[i] != NONE and not piece.startswith(self._spelling_of(int(found[i]), at_start=at_start)):
                found[i] = NONE
        return found

    def _first_of_cut(self, piece: bytes) -> int:
        """Find the first id of bytes that are not whole characters."""
        if self._alphabet is not None:
            tokens = self._inside.model.tokenize("".join(self._alphabet[byte] for byte in piece))
            return tokens[0].id if tokens else NONE
        head = _whole_characters(piece)
        if head:
            return self._inside.encode(head, add_special_tokens=False).ids[0]
        fallback = self._inside.token_to_id(f"<0x{piece[0]:02X}>")
        return NONE if fallback is None else fallback

    def _spelling_of(self, token: int, *, at_start: bool) -> bytes:
        data = self.bytes_of[token]
        return data.removeprefix(b" ") if at_start and self.begins_with_space else data

    def _spelt(self, tokenizer: Tokenizer, text: str) -> bytes:
        return b"".join(self.bytes_of[token] for token in tokenizer.encode(text, add_special_tokens=False).ids)

    def _require_exact(self) -> None:
        for probe, what in _PROBES:
            found = self._spelt(self._inside, probe)
            if found != probe.encode():
                raise UnsupportedField(
                    f"the tokenizer of corpus {self.corpus!r} {what}: it makes {found!r} of {probe.encode()!r}; "
                    "targets are projected between tokenizers that keep every byte, as byte-level BPE and "
                    "SentencePiece with byte fallback do"
                )


def _plain(parts: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps({**parts, "truncation": None, "padding": None, "post_processor": None}))
    # Texts that spell a special token are text, as they are when a corpus is ingested.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_prefix(value: Any) -> Any:
    """Take out of a tokenizer's JSON what puts a space in front of a text."""
    if isinstance(value, list):
        return [
            _without_prefix(each) for each in value if not (isinstance(each, dict) and each.get("type") == "Prepend")
        ]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Prepend":
        return None
    changed = {"prepend_scheme": "never", "add_prefix_space": False}
    return {
        # The vocabulary is large, and has no such part.
        name: each if name in ("model", "added_tokens") else changed.get(name, _without_prefix(each))
        for name, each in value.items()
    }


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _whole_characters(piece: bytes) -> str:
    """Read the characters before the first that is not whole."""
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        return piece[: error.start].decode()
