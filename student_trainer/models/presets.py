"""Named configs of students; the vocabulary is the corpus's."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from potstill.student_trainer.models.settings import Preset

PRESETS: MappingProxyType[Preset, dict[str, Any]] = MappingProxyType(
    {
        # LokiLM (arXiv 2407.07370); the width of the feed-forward and the untied head are in no text that we know of.
        "lokilm-1.4b": {
            "model_type": "lokilm",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
        # The same shape for a laptop: heads of 32, the smallest that vLLM takes on CPUs.
        "lokilm-tiny": {
            "model_type": "lokilm",
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    }
)
