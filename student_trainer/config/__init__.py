"""The config of a run, read once from TOML, what of it may change when the run goes on, and the files that keep it."""

from __future__ import annotations

from potstill.student_trainer.config.train_config import TrainConfig

__all__ = ["TrainConfig"]
