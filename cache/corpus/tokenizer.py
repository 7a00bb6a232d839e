"""Tokenizers by content: the table from ids to bytes, and a fingerprint of it.

Two tokenizer files that map every id to the same bytes are the same tokenizer to a cache; two that differ in one id
are not, however alike their files look.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from potstill.cache.errors import CorruptSegment, InvalidInput
from potstill.cache.hub import hub_file, may_be_hub_name
from potstill.cache.store import GroupReader

SEALED_NAME = "tokenizer_json"
"""Name of the array of a corpus that holds its tokenizer."""
_PIECE_BYTES = 1 << 18
MAX_TOKENIZER_BYTES = 64 * 2**20
"""Most bytes of a corpus's tokenizer as JSON; those of the largest vocabularies have about half."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`, the one in a folder, or that of a model on the Hugging Face hub.

    Raises:
        InvalidInput: there is none, or it cannot be read.
    """
    file = _tokenizer_file(str(path))
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower for a bad file
        raise InvalidInput(f"{str(file)!r} is not a tokenizer: {error}") from error


def _tokenizer_file(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if file.is_file():
        return file
    ways = "give a tokenizer.json, a folder that holds one, or a model's name on the Hugging Face hub"
    if not may_be_hub_name(path):
        raise InvalidInput(f"no tokenizer at {path!r}: {ways}")
    try:
        return hub_file(path, "tokenizer.json")
    except InvalidInput as error:
        raise InvalidInput(f"no tokenizer at {path!r}, and {error.detail}; {ways}") from error


def sealed_tokenizer(reader: GroupReader) -> Iterator[bytes]:
    """Read a corpus's tokenizer as it was sealed; see `sealed_text`."""
    return sealed_text(reader, SEALED_NAME, MAX_TOKENIZER_BYTES, "a sealed tokenizer")


def sealed_text(reader: GroupReader, name: str, most: int, what: str) -> Iterator[bytes]:
    """Read a text of at most `most` bytes that lies in an array, JSON in UTF-8, in pieces of 256 KiB.

    Raises:
        CorruptSegment: stored bytes are damaged, or there are more of them than `what` has.
    """
    size = reader.length(name)
    # Compressed, two gigabytes of one character are a few kilobytes in the store.
    if size > most:
        raise CorruptSegment(f"{reader.path}/{name} has {size} bytes; {what} has at most {most}")
    reader.expect(name, (size,), ("uint8",))
    for start in range(0, size, _PIECE_BYTES):
        yield reader.read(name, start, min(start + _PIECE_BYTES, size)).tobytes()


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest token id; not the number of tokens, as a vocabulary may have holes.

    Raises:
        InvalidInput: the vocabulary is empty.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise InvalidInput("the tokenizer's vocabulary is empty; give the tokenizer that made the rows")
    return max(ids) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash (sha256, hex) of the table from ids to bytes and of which ids are special."""
    digest = hashlib.sha256()
    for token_id, (data, special) in sorted(token_table(tokenizer).items()):
        digest.update(token_id.to_bytes(4, "little"))
        # With its length, so that bytes cannot move from one token to the next unseen.
        digest.update(len(data).to_bytes(4, "little") + data)
        digest.update(b"\x01" if special else b"\x00")
    return digest.hexdigest()


def token_table(tokenizer: Tokenizer) -> dict[int, tuple[bytes, bool]]:
    """Bytes that each id stands for, and whether it is special.

    Byte-level vocabularies (GPT-2 and its heirs) spell bytes as printable characters. SentencePiece vocabularies
    write a space as U+2581, and bytes that are no character as `<0xNN>`. Added tokens are spelt as they are.
    """
    added = tokenizer.get_added_tokens_decoder()
    byte_level = is_byte_level(tokenizer)
    table: dict[int, tuple[bytes, bool]] = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in added:
            table[token_id] = added[token_id].content.encode(), added[token_id].special
        elif byte_level:
            table[token_id] = _byte_level_bytes(token), False
        elif match := _BYTE_TOKEN.fullmatch(token):
            table[token_id] = bytes([int(match[1], 16)]), False
        else:
            table[token_id] = token.replace("\u2581", " ").encode(), False
    return table


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Tell whether a vocabulary spells bytes as printable characters."""
    return "ByteLevel" in (str(tokenizer.decoder) + str(tokenizer.pre_tokenizer))


def _byte_level_bytes(token: str) -> bytes:
    alphabet = byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters of byte-level BPE (GPT-2's `bytes_to_unicode`), as char -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    shifted = [256 + offset for offset in range(len(rest))]
    return {chr(char): byte for char, byte in zip(printable + shifted, printable + rest, strict=True)}
