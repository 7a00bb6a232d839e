"""Settings of what is trained on: corpora, held-out rows, and the teachers whose targets are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from potstill.student_trainer.settings import Count, Frozen


def _whole_or_share(held_out: float | None) -> float | None:
    if held_out is not None and held_out >= 1 and held_out != int(held_out):
        raise ValueError("must be a whole number of rows, or a share below 1")
    return held_out


_HeldOut = Annotated[int | float, Field(ge=0), AfterValidator(_whole_or_share)]
_Weight = Annotated[float, Field(ge=0)]


def _weight_told(value: Any, validated: ValidatorFunctionWrapHandler) -> Any:
    """Validate a weight, with one message instead of one for each kind that it may be of."""
    try:
        return validated(value)
    except ValidationError as error:
        raise ValueError("must be a number of 0 or more, or [step, weight] pairs whose steps rise") from error


Missing: TypeAlias = Literal["fail", "skip", "ask"]
Points: TypeAlias = tuple[tuple[int, float], ...]
"""A weight over the run as pairs (step, weight)."""


def weights_at(points: Points, steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the weight at each step: linear between the points, constant before the first and after the last."""
    return np.interp(steps, [step for step, _ in points], [weight for _, weight in points])


_Points: TypeAlias = tuple[tuple[Annotated[int, Field(ge=0, strict=True)], _Weight], ...]


def _checked(points: Points, unused: str) -> None:
    steps = [step for step, _ in points]
    if not steps or steps != sorted(set(steps)):
        raise ValueError("weight must be a number, or [step, weight] pairs whose steps rise")
    if not any(weight for _, weight in points):
        raise ValueError(f"weight is never over 0; leave the {unused} out")


class CorpusConfig(Frozen):
    """One corpus of a mixture."""

    name: str = Field(min_length=1)
    """As `potstill inspect` lists it."""
    weight: Annotated[_Weight | _Points, WrapValidator(_weight_told)] = 1.0
    """Its share of the rows of a step, relative to the others'; or [step, weight] pairs, linear between them."""
    held_out: _HeldOut | None = None
    """In place of `data.held_out`, for this corpus."""

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        _checked(self.points, "corpus")
        return self

    @property
    def points(self) -> Points:
        """The weight as (step, weight) pairs, of which a constant has one."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)


class DataConfig(Frozen):
    """The corpora to train on, their held-out rows, and the order of the others."""

    cache: str = Field(min_length=1)
    """Folder or URL of the cache; `http://host:port` is a service that has it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds that service's key; `POTSTILL_API_KEY` when not given."""
    corpus: Annotated[str, Field(min_length=1)] | None = None
    """As `potstill inspect` lists it; with several, `corpora` in its place."""
    corpora: tuple[CorpusConfig, ...] = ()
    """A mixture of corpora of one tokenizer."""
    eval_corpora: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Corpora to evaluate on beside the held-out rows; no row that is in one of them is trained on."""
    prefix_ids: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = None
    """Token ids that the student sees in front of each row; by default those of its teachers."""
    held_out: _HeldOut = 0.02
    """The most rows of each corpus never trained on, in whole documents: a count, or below 1 a share of the corpus."""
    held_out_seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Chooses the held-out documents; apart from `train.seed`, so that runs of several seeds compare."""
    leave_out: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Annotations of bool whose rows are neither trained nor evaluated on; by default `contaminated` and all that
    begin with `contaminated-`, as `potstill contamination` makes them."""
    window_shards: Count = 8
    """Rows are shuffled within so many (shuffled) shards at a time; more is more random and reads more objects."""
    missing: Missing = "fail"
    """Way to treat shards without targets: `fail`, `skip` their rows, or `ask` the teacher at `teachers.url`."""
    packing: bool = True
    """Rows share rows of a micro-batch where the student keeps them apart; else those of similar length go together."""
    readers: Count = 4
    """Micro-batches that are read at a time, at most `prefetch`."""
    prefetch: Count = 16
    """Micro-batches read ahead, of at most 512 MiB."""
    patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to go on asking a service that does not answer, before the run stops with a checkpoint."""

    @model_validator(mode="after")
    def _corpora_fit(self) -> Self:
        if (self.corpus is None) == (not self.corpora):
            raise ValueError("give exactly one of corpus and corpora")
        names = [each.name for each in self.mixture]
        if len({*names, *self.eval_corpora}) != len(names) + len(self.eval_corpora):
            raise ValueError("corpora and eval_corpora must have different names")
        steps = sorted({step for each in self.mixture for step, _ in each.points})
        for step, *weights in zip(steps, *(weights_at(each.points, steps) for each in self.mixture), strict=True):
            if not any(weights):
                raise ValueError(f"the weights of all corpora are 0 at step {step}")
        return self

    @property
    def mixture(self) -> tuple[CorpusConfig, ...]:
        """The corpora to train on, one or more."""
        return self.corpora or (CorpusConfig(name=self.corpus or ""),)


class TeacherConfig(Frozen):
    """One teacher and its share of the distillation loss."""

    name: str = Field(min_length=1)
    """As `potstill inspect` lists it, or as the service calls it."""
    weight: Annotated[_Weight | _Points, WrapValidator(_weight_told)] = 1.0
    """Weight of its divergence, relative to the others'; or [step, weight] pairs, linear between them."""
    k: Count | None = None
    """Number of most likely ids to use; by default all that the cache holds, 64 from a service."""
    draws: Count | None = None
    """Draws at each position to ask a service for, where the loss needs some, by default 50; a cache's are its own."""
    source: Literal["cache", "service"] = "cache"
    """`cache` reads committed targets; `service` asks a running one, row by row."""
    url: str | None = None
    """URL of the service: with source = "service", or for what the cache lacks with data.missing = "ask"."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the service's key."""

    @property
    def points(self) -> Points:
        """The weight as (step, weight) pairs, of which a constant has one."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)

    @model_validator(mode="after")
    def _url_with_service(self) -> Self:
        _checked(self.points, "teacher")
        if self.source == "service" and self.url is None:
            raise ValueError('source = "service" needs a url')
        if self.source == "cache" and self.draws is not None:
            raise ValueError(f"draws is {self.draws}, but those of a cache are read as they are kept; leave it out")
        return self
