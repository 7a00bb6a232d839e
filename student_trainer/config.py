"""The config of a training run: one frozen value, read once from TOML or built in Python.

```toml
[data]
cache = "cache"            # folder or URL of the cache that holds the corpus, or http://host:port of a service
corpus = "docs"
held_out = 64              # at most so many rows, of whole documents, are kept for evaluation

[[teachers]]
name = "big"               # as `potstill inspect` lists it
weight = 1.0

[student]
config = { model_type = "llama", hidden_size = 128, num_hidden_layers = 2, num_attention_heads = 4 }

[train]
out = "runs/first"
steps = 1000
batch_rows = 32
alpha = 0.5                # share of the distillation loss; 0 is plain cross-entropy
```

With `[[data.corpora]]` (name, weight) in place of `corpus` the rows are a mixture.

Relative paths are taken from the current folder, like those on the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from potstill.cache.errors import InvalidInput, SpecMismatch
from potstill.cache.named_files import read_toml
from potstill.cache.types import JSON

_FREE_ON_RESUME = frozenset(
    {
        "data.cache",
        "data.api_key_env",
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
        "train.max_failures",
        "train.out",
    }
)
"""Keys that may change when a run goes on: places of things, its length, and how often it evaluates and saves."""

_Count = Annotated[int, Field(ge=1, strict=True)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


Points: TypeAlias = tuple[tuple[int, float], ...]
"""A weight over the run as pairs (step, weight)."""


def weights_at(points: Points, steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the weight at each step: linear between the points, constant before the first and after the last."""
    return np.interp(steps, [step for step, _ in points], [weight for _, weight in points])


class CorpusConfig(_Frozen):
    """One corpus of a mixture."""

    name: str = Field(min_length=1)
    """As `potstill inspect` lists it."""
    weight: Annotated[
        _Weight | tuple[tuple[Annotated[int, Field(ge=0, strict=True)], _Weight], ...], WrapValidator(_weight_told)
    ] = 1.0
    """Its share of the rows of a step, relative to the others'; or [step, weight] pairs, linear between them."""
    held_out: _HeldOut | None = None
    """In place of `data.held_out`, for this corpus."""

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        steps = [step for step, _ in self.points]
        if not steps or steps != sorted(set(steps)):
            raise ValueError("weight must be a number, or [step, weight] pairs whose steps rise")
        if not any(weight for _, weight in self.points):
            raise ValueError("weight is never over 0; leave the corpus out")
        return self

    @property
    def points(self) -> Points:
        """The weight as (step, weight) pairs, of which a constant has one."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)


class DataConfig(_Frozen):
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
    window_shards: _Count = 8
    """Rows are shuffled within so many (shuffled) shards at a time; more is more random and reads more objects."""
    prefetch: _Count = 4
    """Micro-batches read ahead."""
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


class TeacherConfig(_Frozen):
    """One teacher and its share of the distillation loss."""

    name: str = Field(min_length=1)
    """As `potstill inspect` lists it, or as the service calls it."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative weight of this teacher's KL: all weights are divided by their sum."""
    k: _Count | None = None
    """Number of most likely ids to use; by default all that the cache holds, 64 from a service."""
    source: Literal["cache", "service"] = "cache"
    """`cache` reads committed targets; `service` asks a running one, row by row."""
    url: str | None = None
    """URL of the service; only with source = "service"."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the service's key."""

    @model_validator(mode="after")
    def _url_with_service(self) -> Self:
        if (self.source == "service") != (self.url is not None):
            raise ValueError('url goes with source = "service", and only with it')
        return self


class StudentConfig(_Frozen):
    """Exactly one of a `transformers` config (random weights under `train.seed`) or a checkpoint."""

    config: str | dict[str, Any] | None = None
    """A folder or file with a config.json, or its keys (with model_type); vocab_size defaults to the corpus's."""
    checkpoint: str | None = None
    """A folder or hub name that `AutoModelForCausalLM.from_pretrained` takes."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.config is None) == (self.checkpoint is None):
            raise ValueError("give exactly one of config and checkpoint")
        if isinstance(self.config, dict) and "model_type" not in self.config:
            raise ValueError("config needs a model_type, like 'llama'")
        return self


class LoopConfig(_Frozen):
    """Settings of the training loop. Lengths are in steps, batches in rows."""

    out: str = Field(min_length=1)
    """The run's folder; all workers must see the same one."""
    steps: _Count
    """Optimizer steps; a longer run may go on from a shorter one."""
    batch_rows: _Count = 32
    """Rows of one optimizer step, over all workers."""
    micro_batch_rows: _Count = 8
    """Rows of one forward pass of one worker; fewer need less memory, and change the result by rounding only."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """The highest learning rate."""
    warmup: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to `min_lr`, constant, or constant with a linear fall over the last `decay` share."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at which cosine and wsd end."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps over which wsd falls."""
    schedule_steps: _Count | None = None
    """Steps of the schedule, by default `steps`: a run that will be extended names its whole length from the start."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of AdamW, on matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    alpha: _Share = 0.5
    """(1 - alpha) * cross-entropy + alpha * distillation."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Seed of the initial weights, the sample order and dropout."""
    eval_every: _Count = 100
    """Steps between two looks at the held-out rows."""
    checkpoint_every: _Count = 500
    """Steps between two checkpoints; one more is written on Ctrl-C and at the end."""
    keep_checkpoints: _Count = 2
    """The newest ones; older ones are removed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass; weights and optimizer stay float32."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the published model; by default that of `student.checkpoint`, or float32 for random weights."""
    workers: _Count = 1
    """Ray workers, one GPU each where there are GPUs."""
    max_failures: Annotated[int, Field(ge=0, strict=True)] = 3
    """Number of times that killed workers are started again from the newest checkpoint."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_rows < self.workers:
            raise ValueError(f"batch_rows {self.batch_rows} is less than one row for each of {self.workers} workers")
        return self


class TrainConfig(_Frozen):
    """A whole run."""

    data: DataConfig
    teachers: tuple[TeacherConfig, ...] = ()
    student: StudentConfig
    train: LoopConfig

    @model_validator(mode="after")
    def _teachers_match_alpha(self) -> Self:
        if self.train.alpha > 0 and not self.teachers:
            raise ValueError(f"train.alpha is {self.train.alpha} but there is no teacher: add one, or set it to 0")
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teachers must have different names")
        return self

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> TrainConfig:
        """Make a config of a mapping in TOML's shape.

        Raises:
            InvalidInput: naming the first bad key, its value and the limit.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InvalidInput(_one_line(error)) from error

    @classmethod
    def from_toml(cls, path: str | Path, *, out: str | None = None) -> TrainConfig:
        """Read a TOML file; `out` replaces its `train.out`.

        Raises:
            InvalidInput: no such file, not TOML, or a bad value.
        """
        value = read_toml(path)
        if out is not None and isinstance(value.setdefault("train", {}), dict):
            value["train"]["out"] = out
        return cls.of(value)

    @property
    def weights(self) -> tuple[float, ...]:
        """The teachers' weights, summing to 1."""
        total = sum(teacher.weight for teacher in self.teachers)
        return tuple(teacher.weight / total for teacher in self.teachers)

    @property
    def run_dir(self) -> Path:
        """`train.out` as a path."""
        return Path(self.train.out)

    def absolute(self) -> TrainConfig:
        """A copy whose paths are absolute, for processes that start in another folder."""
        student = self.student
        paths = {name: _absolute(value) for name in ("config", "checkpoint") if (value := getattr(student, name))}
        return self.model_copy(
            update={
                "data": self.data.model_copy(update={"cache": _absolute(self.data.cache, always=True)}),
                "student": student.model_copy(update=paths),
                "train": self.train.model_copy(update={"out": str(self.run_dir.absolute())}),
            }
        )

    def to_json(self) -> dict[str, JSON]:
        """A JSON object that `of` reads back to an equal config."""
        return self.model_dump(mode="json")

    def check_continues(self, before: TrainConfig) -> None:
        """Check that a run that was started under `before` may go on under this config.

        Raises:
            SpecMismatch: a key differs whose change would make it another run; the first such key is named.
        """
        ours, theirs = dict(leaves(self.to_json())), dict(leaves(before.to_json()))
        for key in sorted(ours.keys() | theirs.keys()):
            name = ".".join(part for part in key.split(".") if not part.isdigit())
            if name not in _FREE_ON_RESUME and ours.get(key) != theirs.get(key):
                now, then = (repr(each[key]) if key in each else "not there" for each in (ours, theirs))
                raise SpecMismatch(
                    f"{key} is {now}, but it was {then} when the run in {self.train.out!r} was started; change it "
                    "back, or choose another train.out"
                )


def _one_line(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key leaves the right one missing: name the former, which is what was typed.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"]) or "config"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{key} is unknown; known are {', '.join(_known_keys(first['loc'][0], first['loc']))}"
    if isinstance(first["input"], dict | BaseModel):
        return f"{key}: {message}"
    return f"{key} is {first['input']!r}: {message}"


def _known_keys(section: int | str, loc: tuple[int | str, ...]) -> Iterable[str]:
    models: dict[int | str, type[BaseModel]] = {
        "data": DataConfig,
        "teachers": TeacherConfig,
        "student": StudentConfig,
        "train": LoopConfig,
    }
    if loc[:2] == ("data", "corpora"):
        return CorpusConfig.model_fields
    return (models[section] if len(loc) > 1 else TrainConfig).model_fields


def _absolute(value: Any, *, always: bool = False) -> Any:
    """A folder as an absolute path; a URL, a hub name or a table of keys as it is."""
    if isinstance(value, str) and "://" not in value and (always or Path(value).exists()):
        return str(Path(value).absolute())
    return value


def leaves(value: Any, separator: str = ".") -> Iterator[tuple[str, Any]]:
    """Give `{"a": {"b": 1}}` as the pair `("a.b", 1)`; list items go under their index."""
    for key, item in enumerate(value) if isinstance(value, list) else value.items():
        if isinstance(item, Mapping | list):
            yield from ((f"{key}{separator}{inner}", leaf) for inner, leaf in leaves(item, separator))
        else:
            yield str(key), item
