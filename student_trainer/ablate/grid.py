"""The plan of an ablation, read from TOML: a run, and the choices that are made in it one at a time.

```toml
config = "student.toml"        # the run that every cell changes
out = "runs/ablation"
seeds = [0, 1, 2]
baseline = "cross-entropy"     # the cell that the others are compared with

[cells]                        # by name; each has the keys of the run that it changes
cross-entropy = { train.alpha = 0 }
top-8 = { teachers.big.k = 8 }
alone = { teachers = ["big"] } # some of the run's teachers

[grid]                         # cells of every combination, beside those
"train.loss" = ["forward_kl", "reverse_kl"]
"train.temperature" = [1.0, 2.0]
```

`teachers` is by name here. Within a seed all cells begin with the same weights, where their students have the same
shape, and read the same rows in the same order; the held-out rows are those of the run in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_toml
from potstill.cache.types import JSON
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.train_config import one_line
from potstill.student_trainer.settings import Count, Frozen

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
_LONGEST_NAME = 100
_Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


def _seeds_told(value: Any, validated: ValidatorFunctionWrapHandler) -> tuple[int, ...]:
    """Validate seeds, with one message for whatever is wrong."""
    told = "must be two or more different whole numbers, like [0, 1, 2]"
    try:
        seeds: tuple[int, ...] = validated(value)
    except ValidationError as error:
        raise ValueError(told) from error
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(told)
    return seeds


class GridConfig(Frozen):
    """An ablation as its TOML has it."""

    config: str = Field(min_length=1)
    """TOML file of the run that every cell changes."""
    out: str = Field(min_length=1)
    """Folder of the ablation, which holds the runs."""
    seeds: Annotated[tuple[_Seed, ...], WrapValidator(_seeds_told)] = (0, 1, 2)
    """Each cell is trained once with each of them as `train.seed`."""
    baseline: str
    """Name of the cell that the others are compared with."""
    target_loss: Annotated[float, Field(gt=0)] | None = None
    """Held-out loss in nats a token, whose tokens and seconds are told; by default the baseline's at its end."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs of a run: as many run beside each other as have room."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of a run, or a share of one."""
    max_failures: Annotated[int, Field(ge=0, strict=True)] = 3
    """Number of times that a run whose process was killed goes on from its newest checkpoint."""
    tasks: str = ""
    """Tasks that every student is judged by, too, as `potstill evaluate --tasks` takes them: a folder, or names."""
    resamples: Count = 2000
    """Resamples of the documents, or questions, behind an interval over them."""
    cells: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Keys that a cell changes, by the cell's name."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values of a key, by its name with dots: every combination is a cell."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if "://" in self.out:
            raise ValueError(f"out is {self.out!r}: an ablation lies in a folder that its runs see, not at a URL")
        names = [cell.name for cell in self.all_cells]
        if len(names) < 2:
            raise ValueError("there is nothing to compare: give two cells or more, in [cells] or by [grid]")
        for name in names:
            if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
                raise ValueError(f"cell {name[:_LONGEST_NAME]!r}: names are letters, digits and ._=,+- as folders are")
            if names.count(name) > 1:
                raise ValueError(f"two cells are called {name!r}")
        if self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no cell; there are {', '.join(names)}")
        return self

    @classmethod
    def from_toml(cls, path: str | Path, *, out: str | None = None) -> GridConfig:
        """Read a TOML file; `out` replaces its own.

        Raises:
            InvalidInput: no such file, not TOML, or a bad value.
        """
        value = read_toml(path)
        try:
            return cls.model_validate(value | ({} if out is None else {"out": out}))
        except ValidationError as error:
            raise InvalidInput(one_line(error, lambda _: GridConfig.model_fields, whole=repr(str(path)))) from error

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """Cells by name, then those of the grid."""
        named = [Cell(name, changes) for name, changes in self.cells.items()]
        combinations = product(*self.grid.values()) if self.grid else ()
        return (*named, *(_combined(dict(zip(self.grid, values, strict=True))) for values in combinations))


@dataclass(frozen=True, slots=True)
class Cell:
    """One choice of settings."""

    name: str
    changes: Mapping[str, Any]
    """Tables in the shape of the run's TOML, but for `teachers`, which is by name."""

    def config(self, base: Mapping[str, Any], seed: int, out: str) -> TrainConfig:
        """Make the config of its run with a seed.

        Args:
            base: the run that is changed, as its TOML has it.
            seed: in the place of `train.seed`.
            out: the run's folder.

        Raises:
            InvalidInput: a change does not fit the run.
        """
        changes = dict(self.changes)
        own = {"seed": seed, "out": out}
        train = changes.get("train")
        if unused := sorted(own.keys() & train.keys()) if isinstance(train, Mapping) else []:
            raise InvalidInput(
                f"train.{unused[0]} of a cell is not used: `seeds` and `out` of the ablation are for all"
            )
        teachers = _teachers(base.get("teachers", []), changes.pop("teachers", {}))
        merged = _merged({**base, "teachers": teachers}, changes)
        return TrainConfig.of(_merged(merged, {"train": own}))


def _combined(values: Mapping[str, Any]) -> Cell:
    """The cell of some values by dotted key, which gives it its name."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        changes = _merged(changes, nested)
    return Cell(",".join(f"{key.rpartition('.')[2]}={_told(value)}" for key, value in values.items()), changes)


def _told(value: JSON) -> str:
    """A value as a folder's name can have it."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value)).strip("-")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes into nested tables; what is no table is replaced."""
    merged = dict(base)
    for key, change in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, change) if isinstance(before, Mapping) and isinstance(change, Mapping) else change
    return merged


def _teachers(base: list[dict[str, Any]], changes: Any) -> list[dict[str, Any]]:
    """Choose some of the run's teachers by a list of names, or change them by tables under their names."""
    by_name = {each.get("name", ""): each for each in base}
    names = list(changes) if isinstance(changes, list | Mapping) else [changes]
    unknown = next((name for name in names if name not in by_name), None)
    if unknown is not None:
        raise InvalidInput(f"teachers.{unknown} is no teacher of the run; there are {', '.join(by_name) or 'none'}")
    if isinstance(changes, Mapping):
        return [_merged(each, changes.get(name, {})) for name, each in by_name.items()]
    return [by_name[name] for name in names]
