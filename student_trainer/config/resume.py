"""The keys of a run's config that may change when the run goes on."""

from __future__ import annotations

from potstill.cache.errors import SpecMismatch
from potstill.student_trainer.config.leaves import leaves
from potstill.student_trainer.config.train_config import TrainConfig

FREE_ON_RESUME = frozenset(
    {
        "data.cache",
        "data.api_key_env",
        "data.leave_out",
        "data.packing",
        "data.readers",
        "data.prefetch",
        "data.patience",
        "teachers.url",
        "teachers.api_key_env",
        "train.steps",
        "train.schedule_steps",
        "train.micro_batch_rows",
        "train.eval_every",
        "train.checkpoint_every",
        "train.save_dtype",
        "train.keep_checkpoints",
        "train.workers",
        "train.device",
        "train.parallel",
        "train.activation_checkpointing",
        "train.compile",
        "train.max_failures",
        "train.max_preemptions",
        "train.worker_runtime_env",
        "train.rollback_over",
        "train.rollback_window",
        "train.trackers",
        "train.peak_flops",
        "train.out",
    }
)
"""Keys that may change when a run goes on: places of things, how they are read, its length, evaluations and saves.

Which rows are left out is checked by the rows themselves."""


def check_continues(config: TrainConfig, before: TrainConfig) -> None:
    """Check that a run that was started under `before` may go on under `config`.

    Raises:
        SpecMismatch: a key differs whose change would make it another run; the first such key is named.
    """
    ours, theirs = dict(leaves(config.to_json())), dict(leaves(before.to_json()))
    for key in sorted(ours.keys() | theirs.keys()):
        name = ".".join(part for part in key.split(".") if not part.isdigit())
        if not _is_free(name) and ours.get(key) != theirs.get(key):
            now, then = (repr(each[key]) if key in each else "not there" for each in (ours, theirs))
            raise SpecMismatch(
                f"{key} is {now}, but it was {then} when the run in {config.train.out!r} was started; change it "
                "back, or choose another train.out"
            )


def _is_free(name: str) -> bool:
    """Tell whether a key may change, or what it is in."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in FREE_ON_RESUME for n in range(1, len(parts) + 1))
