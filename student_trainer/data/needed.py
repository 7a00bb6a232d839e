"""The fields of a teacher's targets that a loss needs beside the top-k."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from potstill.cache.errors import UnsupportedField
from potstill.cache.targets.unshared_ids import UnsharedIds
from potstill.cache.types import Fields, Targets
from potstill.student_trainer.losses.settings import LossConfig


def needed_of_cache(name: str, k: int, held: Fields, loss: LossConfig) -> Fields:
    """Choose what to read of a cache that holds some fields of the teacher `name`.

    Raises:
        UnsupportedField: the loss needs more; the option of `potstill prefill` that adds it is named.
    """
    if _draws(loss) and not held.draws:
        raise _lacking(f"train.loss {loss.loss!r} needs draws", name, "--top-k 0 --draws 50")
    if loss.temperature != 1.0 and loss.temperature not in held.temperatures:
        kept = f", only at {', '.join(f'{t:g}' for t in held.temperatures)}" if held.temperatures else ""
        told = f"train.temperature {loss.temperature:g} needs log Z at it"
        raise _lacking(told, name, f"--top-k 0 --temperatures {loss.temperature:g}", kept)
    if loss.weighting == "entropy" and not held.entropy:
        raise _lacking("train.weighting 'entropy' needs entropies", name, "--top-k 0 --entropy")
    return Fields(
        k=k,
        draws=held.draws if _draws(loss) else 0,
        seed=held.seed if _draws(loss) else 0,
        temperatures=held.temperatures if loss.temperature != 1.0 else (),
        entropy=loss.weighting == "entropy",
    )


def needed_of_service(name: str, k: int, loss: LossConfig) -> Fields:
    """Choose what to ask a service for.

    Raises:
        UnsupportedField: the loss needs draws, of which a cache says how many there are.
    """
    if _draws(loss):
        raise UnsupportedField(
            f"train.loss {loss.loss!r} reads draws from a cache, but a service is asked for teacher {name!r}; prefill "
            "with --draws 50 and read the cache"
        )
    return Fields(
        k=k,
        temperatures=(loss.temperature,) if loss.temperature != 1.0 else (),
        entropy=loss.weighting == "entropy",
    )


def for_student(answer: Targets, fields: Fields, loss: LossConfig, other: UnsharedIds | None, no_id: int) -> Targets:
    """Keep of log Z the run's temperature, and put `no_id` for ids that are another token to the student."""
    if answer.log_z is not None:
        at = fields.temperatures.index(loss.temperature)
        answer = replace(answer, log_z=answer.log_z[:, at : at + 1])
    if not other:
        return answer
    draws = answer.draws
    if draws is not None:
        draws = replace(draws, ids=np.where(other.holds(draws.ids), np.uint32(no_id), draws.ids))
    return replace(answer, ids=np.where(other.holds(answer.ids), np.uint32(no_id), answer.ids), draws=draws)


def _draws(loss: LossConfig) -> bool:
    return loss.loss in ("draws", "hybrid")


def _lacking(told: str, name: str, option: str, kept: str = "") -> UnsupportedField:
    return UnsupportedField(f"{told}, which the cache has not of {name!r}{kept}; run `potstill prefill` with {option}")
