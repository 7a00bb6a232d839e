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
        UnsupportedField: the loss needs more; the option of `potstill prefill` that adds it is named, but for targets
            that are projected, which have a top-k and no more.
    """
    if _draws(loss) and not held.draws:
        raise _lacking(f"train.loss {loss.loss!r} needs draws", name, held, "--top-k 0 --draws 50")
    if loss.dense and not held.dense:
        raise _lacking("train.dense needs the logprobs of all ids", name, held, "--top-k 0 --dense")
    if loss.weighting == "label" and not k:
        raise _lacking("train.weighting 'label' needs logprobs of labels", name, held, "--top-k 64")
    if _needs_log_z(loss) and loss.temperature not in held.temperatures:
        kept = f", only at {', '.join(f'{t:g}' for t in held.temperatures)}" if held.temperatures else ""
        told = f"train.temperature {loss.temperature:g} needs log Z at it"
        raise _lacking(told, name, held, f"--top-k 0 --temperatures {loss.temperature:g}", kept)
    if loss.weighting == "entropy" and not held.entropy:
        raise _lacking("train.weighting 'entropy' needs entropies", name, held, "--top-k 0 --entropy")
    return Fields(
        k=k,
        draws=held.draws if _draws(loss) else 0,
        seed=held.seed if _draws(loss) else 0,
        temperatures=held.temperatures if _needs_log_z(loss) else (),
        entropy=loss.weighting == "entropy",
        dense=loss.dense,
        alignment=held.alignment,
    )


def needed_of_service(k: int, draws: int, seed: int, loss: LossConfig) -> Fields:
    """Choose what to ask a service for: `draws` under `seed` only where the loss needs them."""
    return Fields(
        k=k,
        draws=draws if _draws(loss) else 0,
        seed=seed if _draws(loss) else 0,
        temperatures=(loss.temperature,) if _needs_log_z(loss) else (),
        entropy=loss.weighting == "entropy",
        dense=loss.dense,
    )


def for_student(answer: Targets, fields: Fields, loss: LossConfig, other: UnsharedIds | None, no_id: int) -> Targets:
    """Keep what the loss takes, and put `no_id` for ids that are another token to the student.

    Of log Z that is the run's temperature. A dense answer becomes a top-k of all ids.
    """
    if loss.dense:
        answer = _of_all_ids(answer, loss.temperature)
    elif answer.log_z is not None:
        at = fields.temperatures.index(loss.temperature)
        answer = replace(answer, log_z=answer.log_z[:, at : at + 1])
    if not other:
        return answer
    draws = answer.draws
    if draws is not None:
        draws = replace(draws, ids=np.where(other.holds(draws.ids), np.uint32(no_id), draws.ids))
    return replace(answer, ids=np.where(other.holds(answer.ids), np.uint32(no_id), answer.ids), draws=draws)


def _of_all_ids(answer: Targets, temperature: float) -> Targets:
    assert answer.dense is not None, "asked for"
    ids = np.broadcast_to(np.arange(answer.dense.shape[1], dtype=np.uint32), answer.dense.shape)
    log_z = None
    if temperature != 1.0:
        cooled = answer.dense.astype(np.float64) / temperature
        most = cooled.max(axis=1, keepdims=True)
        log_z = (most + np.log(np.exp(cooled - most).sum(axis=1, keepdims=True))).astype(np.float32)
    no_tail = np.full_like(answer.log_tail, -np.inf)
    return replace(answer, ids=ids, logprobs=answer.dense, log_tail=no_tail, log_z=log_z, dense=None)


def _needs_log_z(loss: LossConfig) -> bool:
    return loss.temperature != 1.0 and not loss.dense


def _draws(loss: LossConfig) -> bool:
    return loss.loss in ("draws", "hybrid")


def _lacking(told: str, name: str, held: Fields, option: str, kept: str = "") -> UnsupportedField:
    if held.alignment:
        return UnsupportedField(
            f"{told}, which targets of {name!r} cannot have: they are projected from another tokenizer's; leave "
            f"{told.partition(' ')[0]} out"
        )
    return UnsupportedField(f"{told}, which the cache has not of {name!r}{kept}; run `potstill prefill` with {option}")
