"""The files beside a `tokenizer.json`: which tokens begin, end and pad a text, and how a conversation is written.

A corpus keeps their texts as they are, so that a student made of it gets the whole tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.tokenizer import sealed_text
from potstill.cache.errors import FormatError, InvalidInput
from potstill.cache.hub import may_be_hub_name, optional_hub_file
from potstill.cache.named_files import json_object, read_named
from potstill.cache.store import GroupReader

SEALED_FILES = "tokenizer_files"
"""Name of the array of a corpus that holds the files."""
_CONFIG, _TOKEN_MAP = "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE, _TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
_TOKENS = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_PROBE = "a"
"""Text of which a tokenizer makes at least one token."""
FILE_NAMES = (_CONFIG, _TOKEN_MAP, _TEMPLATE, _TEMPLATE_JSON)
MAX_FILE_BYTES = 4 * 2**20
"""Most bytes of one file; the configurations of the largest vocabularies have a fourth."""
MAX_SEALED_BYTES = 6 * len(FILE_NAMES) * MAX_FILE_BYTES
"""Most bytes of all files in one JSON object, which spells some characters in six."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The ids that a tokenizer's files name, and the template of a conversation; None for what they do not."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    chat_template: str | None = None
    """Jinja source, for `transformers`' `apply_chat_template`."""

    @classmethod
    def of(cls, files: Mapping[str, str], tokenizer: Tokenizer) -> SpecialTokens:
        """Read them from the texts of files, by name.

        Raises:
            InvalidInput: a file is no JSON object, names a token that the tokenizer lacks, or has a template that is
                no text.
        """
        named = named_tokens(files)
        ids = {key: _id(tokenizer, f"{key}_token", named.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
        return cls(**ids, chat_template=_chat_template(files))


def named_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Texts of the tokens that a tokenizer's files name, by key, such as `bos_token`.

    Raises:
        InvalidInput: a file is no JSON object, or names something else.
    """
    tokens = {}
    for file in (_TOKEN_MAP, _CONFIG):  # the later wins
        for key, value in _object(files, file).items():
            # An added token is spelt as its text, or as an object that has it as its content.
            token = value.get("content") if isinstance(value, dict) else value
            if key not in _TOKENS or token is None:
                continue
            if not isinstance(token, str):
                raise InvalidInput(f"{file} names {token!r:.80} as {key}, which is no text; mend the file")
            tokens[key] = token
    return tokens


def declared_bos(tokenizer: Tokenizer, files: Mapping[str, str]) -> int | None:
    """Id that a tokenizer puts before text by its `tokenizer_config.json`, or by its post-processor; None for none.

    Raises:
        InvalidInput: a file is no JSON object, or names something else than a text as a token.
    """
    declared = _object(files, _CONFIG).get("add_bos_token")
    if declared is False:
        return None
    if declared is True and (named := named_tokens(files).get("bos_token")):
        bos = tokenizer.token_to_id(named)
        if bos is not None:
            return int(bos)
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    whole = tokenizer.encode(_PROBE).ids
    return int(whole[0]) if len(whole) > len(plain) and whole[:1] != plain[:1] else None


def load_tokenizer_files(path: str | Path) -> dict[str, str]:
    """Read the texts of those files of `FILE_NAMES` that lie beside a tokenizer, by name.

    `path` is as for `load_tokenizer`: a folder, a file in it, or a model's name on the Hugging Face hub.

    Raises:
        InvalidInput: a file is not UTF-8, is over `MAX_FILE_BYTES`, or is named `.json` and is no JSON object; or the
            hub cannot be reached.
    """
    here = Path(path)
    folder = here if here.is_dir() else here.parent
    on_hub = may_be_hub_name(str(path))
    texts = {}
    for name in FILE_NAMES:
        file = optional_hub_file(str(path), name) if on_hub else folder / name
        if file is not None and file.is_file():
            texts[name] = _text(file)
    return texts


def sealed_bytes(files: Mapping[str, str]) -> NDArray[np.uint8]:
    """Write files as they are sealed: a JSON object from name to text, in UTF-8, as uint8 [bytes]."""
    return np.frombuffer(json.dumps(dict(files), sort_keys=True).encode(), dtype=np.uint8)


def sealed_tokenizer_files(reader: GroupReader) -> Iterator[bytes]:
    """Read the files that were sealed with a corpus, as `sealed_bytes` wrote them; none in those before format 3.

    Raises:
        CorruptSegment: stored bytes are damaged, or there are more of them than files have.
    """
    if not reader.has(SEALED_FILES):
        return iter((b"{}",))
    return sealed_text(reader, SEALED_FILES, MAX_SEALED_BYTES, "an object of sealed files")


def parse_tokenizer_files(data: bytes | str, where: str) -> dict[str, str]:
    """Read what `sealed_bytes` wrote; `where` names it in errors.

    Raises:
        FormatError: it is no JSON object from name to text, or has a name that is none of `FILE_NAMES`.
    """
    try:
        files = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from error
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise FormatError(f"{where} is no JSON object from the names of files to their texts")
    # They are written into folders under these names, and whoever made the corpus could name any path.
    for name in files.keys() - set(FILE_NAMES):
        raise FormatError(f"{where} has a file {name!r:.80}, which is none of {', '.join(FILE_NAMES)}")
    return files


def _text(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InvalidInput(f"{file} has {size} bytes; a corpus keeps at most {MAX_FILE_BYTES}: take out what is large")
    text = read_named(file)
    if file.suffix == ".json":
        json_object(text, str(file))
    return text


def _object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    return json_object(files.get(name, "{}"), name)


def _id(tokenizer: Tokenizer, key: str, token: str | None) -> int | None:
    found = None if token is None else tokenizer.token_to_id(token)
    if token is not None and found is None:
        raise InvalidInput(
            f"a file beside the tokenizer names {token!r:.80} as {key}, and the tokenizer has no such token; mend the "
            "file, or give the tokenizer.json that belongs to it"
        )
    return found


def _chat_template(files: Mapping[str, str]) -> str | None:
    """The template that `transformers` takes where none is named: a file of its own comes first."""
    if _TEMPLATE in files:
        return files[_TEMPLATE]
    for name in (_CONFIG, _TEMPLATE_JSON):
        template = _object(files, name).get("chat_template")
        if isinstance(template, list):
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
        if template is not None:
            raise InvalidInput(f"{name} has a chat_template that is no text: {template!r:.80}")
    return None
