"""The demo's numbers, and the places where it keeps things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.student_trainer.config import TrainConfig

TEACHER = "smollm2"
CORPUS = "pydoc"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """Sized for two cores: the teacher reads about 130 tokens/s there, a student step takes about a second."""

    out: Path
    models: Path
    text_tokens: int = 10_000
    """Text is taken, document by document, until there is about this much."""
    row_tokens: int = 256
    shard_positions: int = 2_048
    k: int = 64
    encoding: str = "u8"
    held_out_rows: int = 10
    steps: int = 80
    batch_rows: int = 4
    lr: float = 4e-3
    alpha: float = 1.0
    """Share of the distillation loss in the distilled student; the other one has none."""
    seed: int = 0
    hidden_size: int = 128
    layers: int = 2
    eval_every: int = 10

    @property
    def cache(self) -> Path:
        """The cache's root."""
        return self.out / "cache"

    @property
    def text(self) -> Path:
        """The folder of the text files that are ingested."""
        return self.out / "text"

    def run_dir(self, student: str) -> Path:
        """The folder of a student's run."""
        return self.out / "runs" / student

    def train_config(self, student: str, alpha: float) -> TrainConfig:
        """Config of one student. Two students differ in `alpha` only: same seed, rows, order and steps."""
        config: dict[str, Any] = {
            "data": {"cache": str(self.cache), "corpus": CORPUS, "held_out": self.held_out_rows},
            "teachers": [{"name": TEACHER}],
            "student": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": self.hidden_size,
                    "intermediate_size": 3 * self.hidden_size,
                    "num_hidden_layers": self.layers,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "tie_word_embeddings": True,
                }
            },
            "train": {
                "out": str(self.run_dir(student)),
                "steps": self.steps,
                "batch_rows": self.batch_rows,
                "micro_batch_rows": self.batch_rows,
                "lr": self.lr,
                "warmup": max(1, self.steps // 12),
                "alpha": alpha,
                "seed": self.seed,
                "eval_every": self.eval_every,
                "checkpoint_every": self.steps,
            },
        }
        return TrainConfig.of(config)
