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

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_toml
from potstill.cache.types import JSON
from potstill.student_trainer.data.settings import CorpusConfig, DataConfig, TeacherConfig, weights_at
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.settings import Frozen
from potstill.student_trainer.train.settings import LoopConfig


class TrainConfig(Frozen):
    """A whole run."""

    data: DataConfig
    teachers: tuple[TeacherConfig, ...] = ()
    student: StudentConfig
    train: LoopConfig

    @model_validator(mode="after")
    def _teachers_match_alpha(self) -> Self:
        if self.train.distils and not self.teachers:
            name = "alpha" if any(share for _, share in self.train.alpha_points) else "alm"
            value = getattr(self.train, name)
            raise ValueError(f"train.{name} is {value} but there is no teacher: add one, or set it to 0")
        if self.train.weighting != "fixed" and len(self.teachers) < 2:
            raise ValueError(f"train.weighting is {self.train.weighting!r}, but there is one teacher; leave it out")
        if self.data.missing != "fail" and all(teacher.source == "service" for teacher in self.teachers):
            raise ValueError(
                f"data.missing is {self.data.missing!r}, but no teacher is read from a cache; leave it out"
            )
        if self.train.dense and (cut := [teacher for teacher in self.teachers if teacher.k is not None]):
            raise ValueError(
                f"train.dense takes all ids, but teachers.k is {cut[0].k} for {cut[0].name!r}; leave it out"
            )
        for step in sorted({step for teacher in self.teachers for step, _ in teacher.points}):
            if not any(self._weights_at(step)):
                raise ValueError(f"the weights of all teachers are 0 at step {step}")
        unasked = [teacher.name for teacher in self.teachers if teacher.url is None]
        if unasked and self.data.missing == "ask":
            raise ValueError(f"data.missing is 'ask', but teacher {unasked[0]!r} has no url; set teachers.url")
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teachers must have different names")
        unused = [teacher.name for teacher in self.teachers if teacher.source == "cache" and teacher.url is not None]
        if unused and self.data.missing != "ask":
            raise ValueError(
                f'the url of teacher {unused[0]!r} is not used: set its source to "service", or data.missing to "ask"'
            )
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
            raise InvalidInput(one_line(error, _known_keys)) from error

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

    def weights(self, step: int = 0) -> tuple[float, ...]:
        """The teachers' weights, summing to 1, of the step that follows `step` steps."""
        found = self._weights_at(step)
        return tuple(weight / sum(found) for weight in found)

    def _weights_at(self, step: int) -> list[float]:
        return [float(weights_at(teacher.points, [step])[0]) for teacher in self.teachers]

    @property
    def run_dir(self) -> Path:
        """The run's folder; of a run in an object store, its copy on this machine."""
        return local_copy(self.train.out) if self.in_store else Path(self.train.out)

    @property
    def in_store(self) -> bool:
        """True where `train.out` is the URL of an object store."""
        return "://" in self.train.out

    def absolute(self) -> TrainConfig:
        """A copy whose paths are absolute, for processes that start in another folder."""
        student = self.student
        paths = {name: _absolute(value) for name in ("config", "checkpoint") if (value := getattr(student, name))}
        return self.model_copy(
            update={
                "data": self.data.model_copy(update={"cache": _absolute(self.data.cache, always=True)}),
                "student": student.model_copy(update=paths),
                "train": self.train.model_copy(update={"out": _absolute(self.train.out, always=True)}),
            }
        )

    def to_json(self) -> dict[str, JSON]:
        """A JSON object that `of` reads back to an equal config."""
        return self.model_dump(mode="json")


def local_copy(url: str) -> Path:
    """The folder that keeps a copy of the run at a URL: one of `$XDG_CACHE_HOME/potstill/runs`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "potstill" / "runs" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "data": DataConfig,
    "teachers": TeacherConfig,
    "student": StudentConfig,
    "train": LoopConfig,
}


def one_line(
    error: ValidationError, known: Callable[[Sequence[int | str]], Iterable[str]], *, whole: str = "config"
) -> str:
    """Put the first error of settings into words.

    Args:
        error: pydantic's.
        known: gives the keys that there are beside one, by its place.
        whole: names what all of them make, for an error of no single key.
    """
    errors = error.errors(include_url=False)
    # A misspelt key leaves the right one missing: name the former, which is what was typed.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"]) or whole
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        belongs = [section for section, model in _SECTIONS.items() if first["loc"][-1] in model.model_fields]
        if error.title == TrainConfig.__name__ and belongs and (len(first["loc"]) == 1 or first["loc"][0] in _SECTIONS):
            return f"{key} is unknown; {first['loc'][-1]} belongs to [{'] or ['.join(belongs)}]"
        return f"{key} is unknown; known are {', '.join(known(first['loc']))}"
    if isinstance(first["input"], dict | BaseModel):
        return f"{key}: {message}"
    return f"{key} is {first['input']!r}: {message}"


def _known_keys(loc: Sequence[int | str]) -> Iterable[str]:
    if tuple(loc[:2]) == ("data", "corpora"):
        return CorpusConfig.model_fields
    return (_SECTIONS[str(loc[0])] if len(loc) > 1 else TrainConfig).model_fields


def _absolute(value: Any, *, always: bool = False) -> Any:
    """A folder as an absolute path; a URL, a hub name or a table of keys as it is."""
    if isinstance(value, str) and "://" not in value and (always or Path(value).exists()):
        return str(Path(value).absolute())
    return value
