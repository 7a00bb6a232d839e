"""Reading of a model's `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.cache.errors import InvalidInput
from potstill.teacher_service.engine.model_folder import checkpoint_dtype


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "float32"}, "vision_config": {"dtype": "float16"}}, "float32"),
        ({"dtype": None, "text_config": {"torch_dtype": "float32"}}, "float32"),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float32"}}, "bfloat16"),
        ({"llm_config": {"torch_dtype": "float32"}}, "float32"),
        ({"text_config": None}, ""),
        ({}, ""),
    ],
)
def test_the_type_of_the_weights_may_be_said_of_the_text_part(
    tmp_path: Path, config: dict[str, Any], dtype: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint_dtype(tmp_path) == dtype


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match="/config.json is not (JSON|a JSON object)"):
        checkpoint_dtype(tmp_path)
