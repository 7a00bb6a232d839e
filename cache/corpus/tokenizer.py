"""What a tokenizer is to the cache: an id -> bytes table, and its fingerprint.

Two tokenizer files that map every id to the same bytes are the same tokenizer; two that differ in
one id are not, however alike their files look.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from potstill.cache.errors import InvalidInput

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or in a folder that holds one.

    Raises:
        InvalidInput: there is none, or it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise InvalidInput(f"no tokenizer at {str(path)!r}: give a tokenizer.json or a folder that holds one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower for a bad file
        raise InvalidInput(f"{str(file)!r} is not a tokenizer: {error}") from error


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id: a vocabulary may have holes.

    Raises:
        InvalidInput: it has no token.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise InvalidInput("the tokenizer's vocabulary is empty; give the tokenizer that made the rows")
    return max(ids) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256, in hex, of the id -> bytes table and the special ids."""
    special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    digest = hashlib.sha256()
    for token_id, data in sorted(token_bytes(tokenizer).items()):
        digest.update(token_id.to_bytes(4, "little"))
        digest.update(len(data).to_bytes(4, "little") + data)
        digest.update(b"\x01" if token_id in special else b"\x00")
    return digest.hexdigest()


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes each id stands for.

    Byte-level vocabularies (GPT-2 and its heirs) spell bytes as printable characters, SentencePiece
    ones write a space as U+2581 and odd bytes as `<0xNN>`; added tokens are spelt as they are.
    """
    added = tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in (str(tokenizer.decoder) + str(tokenizer.pre_tokenizer))
    table: dict[int, bytes] = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in added:
            table[token_id] = added[token_id].content.encode()
        elif byte_level:
            table[token_id] = _byte_level_bytes(token)
        elif match := _BYTE_TOKEN.fullmatch(token):
            table[token_id] = bytes([int(match[1], 16)])
        else:
            table[token_id] = token.replace("\u2581", " ").encode()
    return table


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters of byte-level BPE (GPT-2's `bytes_to_unicode`), as char -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    shifted = [256 + offset for offset in range(len(rest))]
    return {chr(char): byte for char, byte in zip(printable + shifted, printable + rest, strict=True)}
