"""Model folders: what is in them, by which a teacher is recognised."""

from __future__ import annotations

import hashlib
from pathlib import Path

from potstill.cache.corpus.teacher_tokenizer import TeacherTokenizer
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.errors import InvalidInput
from potstill.cache.hub import hub_file, may_be_hub_name
from potstill.cache.named_files import read_json_object

_WEIGHT_KINDS = ("*.safetensors", "*.bin", "*.gguf")
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Keys of a `config.json` below which models with other senses have what concerns text."""


def model_name(model: str) -> str:
    """Name of the model in identities: of a folder its last component, never a machine's path; of the hub as it is."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def model_folder(model: str, revision: str = "") -> Path:
    """The local folder, or that of the hub's snapshot with the config alone; vLLM puts the weights beside it.

    Raises:
        InvalidInput: there is no such folder or model, or it has no weights.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInput(f"{model!r} is no model folder: it has no config.json")
        weight_files(path)
        return path
    if not may_be_hub_name(model):
        raise InvalidInput(f"there is no model folder {model!r}")
    try:
        return hub_file(model, "config.json", revision=revision).parent
    except InvalidInput as error:
        raise InvalidInput(f"{model!r} is no model folder, and {error.detail}") from error


def checkpoint_dtype(folder: Path) -> str:
    """The type of the weights by the `config.json`, or by its part about text; empty where neither says.

    Raises:
        InvalidInput: the file cannot be read.
    """
    config = read_json_object(folder / "config.json")
    parts = [config, *(config[name] for name in _TEXT_PARTS if isinstance(config.get(name), dict))]
    said = [part.get("dtype") or part.get("torch_dtype") for part in parts]
    return str(next(filter(None, said), ""))


def weights_sha256(folder: Path) -> str:
    """SHA-256, in hex, over the hex SHA-256s of the weight files in name order."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").hexdigest().encode())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Weight files in name order, of the first kind there is in vLLM's order: safetensors, then bin, then gguf.

    Raises:
        InvalidInput: there are none.
    """
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in _WEIGHT_KINDS)), [])
    if not files:
        raise InvalidInput(f"the model folder {folder.name!r} has no weights ({', '.join(_WEIGHT_KINDS)})")
    return files


def model_tokenizer(folder: Path) -> TeacherTokenizer:
    """Load the model's tokenizer.

    Raises:
        InvalidInput: there is none, or none that `tokenizers` reads.
    """
    if (folder / "tokenizer.json").is_file():
        return TeacherTokenizer.of(load_tokenizer(folder), folder)
    from transformers import AutoTokenizer  # noqa: PLC0415 -- heavy, and seldom needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the model folder {folder.name!r} has no tokenizer: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidInput(f"the tokenizer of {folder.name!r} has no fast form; add its tokenizer.json")
    return TeacherTokenizer.of(backend, folder)
