"""The fields that a teacher can answer at each position, in one table (`FIELDS`), and a choice of them (`Fields`).

All code that stores, sends, counts or names fields goes by the table. A further field of floats takes an attribute of
`Fields` and one of `Targets`, an entry here, a codec in `potstill.cache.encoding.fields`, and a teacher's computation.

Shape legend:  K kept entries, V vocabulary size, N draws.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from potstill.cache.errors import InvalidInput, SpecMismatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Field:
    """One field: an entry of the table."""

    name: str
    """Name where fields are chosen by name, and attribute of `Targets` (the top-k has four attributes there)."""
    attributes: Mapping[str, str]
    """Attributes of `Fields` that choose it, with the help text of their command-line options. When the first is 0,
    empty or False the field is not asked for, and the others mean nothing."""
    shape: Callable[[Fields, int], tuple[int, ...]] | None = None
    """Shape of a position's float32 numbers, given the choice and V; None for a field that is no array of floats."""
    label: str = ""
    """Format of its part of a folder's name, with attributes of `Fields` in braces; by default `name`."""
    text: str = ""
    """Format of its description for people; by default `label`."""
    is_asked_of_teachers: bool = True
    """False for one that no running teacher answers."""

    @property
    def asked_by(self) -> str:
        """Attribute of `Fields` that asks for the field."""
        return next(iter(self.attributes))

    @property
    def is_scalar(self) -> bool:
        """True for a field of one float a position."""
        return self.shape is not None and self.shape(Fields(), 1) == ()

    def is_asked(self, fields: Fields) -> bool:
        """Tell whether the field is among `fields`."""
        return bool(getattr(fields, self.asked_by))

    def values(self, fields: Fields) -> dict[str, Any]:
        """Values of its attributes in `fields`; 0, empty or False when the field is not asked for."""
        values = {name: getattr(fields, name) for name in self.attributes}
        return values if self.is_asked(fields) else {name: type(value)() for name, value in values.items()}

    def serves(self, held: Fields, want: Fields) -> bool:
        """Tell whether targets with the fields `held` have all of this field that is wanted, which may be nothing."""
        if self is TOP_K:
            return held.k >= want.k
        return not self.is_asked(want) or self.values(held) == self.values(want)


TOP_K = Field(
    name="top_k",
    attributes={"k": "entries kept a position, 0 for none (default 64)"},
    label="top-{k}",
)
FIELDS = (
    TOP_K,
    Field(
        name="draws",
        attributes={"draws": "draws with replacement a position", "seed": "of the draws (default 0)"},
        label="draws-{draws}",
        text="{draws} draws of seed {seed}",
    ),
    Field(name="entropy", attributes={"entropy": "keep the entropy of each position"}, shape=lambda _, __: ()),
    Field(
        name="log_z",
        attributes={"temperatures": "keep log sum p**(1/T) of each T"},
        shape=lambda want, _: (len(want.temperatures),),
        label="log-z",
        text="log Z at {temperatures}",
    ),
    Field(
        name="dense",
        attributes={"dense": "keep all logprobs: for small evaluation splits"},
        shape=lambda _, vocab_size: (vocab_size,),
    ),
    Field(
        name="alignment",
        attributes={"alignment": "how the tokens lie to those of a teacher with another tokenizer"},
        shape=lambda _, __: (3,),
        is_asked_of_teachers=False,
    ),
)
"""The table, in the order in which fields are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A choice of fields: those that are asked of a teacher, or that a target set holds.

    Raises:
        InvalidInput: a value is one that no teacher can serve, or no field is chosen.
    """

    k: int = 64
    """Number of top-k entries, which come with the tail mass and the label's logprob; 0 for none of the three."""
    draws: int = 0
    """Number of draws with replacement at a position (Sparse Logit Sampling, arXiv 2503.16870)."""
    seed: int = 0
    """Seed of the draws; it means nothing without them."""
    entropy: bool = False
    temperatures: tuple[float, ...] = ()
    """Temperatures T for which the log of the sum of p**(1/T) is kept."""
    dense: bool = False
    """True for all V logprobs, which only small evaluation splits can afford."""
    alignment: bool = False
    """True where targets are projected from another tokenizer's: see `Targets.alignment`."""

    def __post_init__(self) -> None:
        # A tuple, as `from_json` makes it, so that fields equal their round trip.
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise InvalidInput(f"fields.k is {self.k!r}; it must be a whole number of at least 0")
        if not self.asked:
            *others, last = (each.asked_by for each in FIELDS if each is not TOP_K)
            raise InvalidInput(f"fields ask for nothing: k is 0 and no {', '.join(others)} or {last}")
        for name, most, bounds in (("draws", 2**16 - 1, "[0, 65535]"), ("seed", 2**63 - 1, "[0, 2**63)")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise InvalidInput(f"fields.{name} is {value!r}; it must be a whole number in {bounds}")
        for t in self.temperatures:
            if not isinstance(t, float | int) or isinstance(t, bool) or not 0 < t <= sys.float_info.max:
                raise InvalidInput(f"fields.temperatures has {t!r}; each must be a positive number")
        for name, attribute in self.__dataclass_fields__.items():
            if attribute.default is False and not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"fields.{name} is {getattr(self, name)!r}; it must be true or false")

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object with one key per attribute; `alignment` is left out where it is not asked for."""
        plain = {**asdict(self), "temperatures": list(self.temperatures)}
        if not self.alignment:
            del plain["alignment"]  # earlier software refuses keys that it does not know
        return plain

    @classmethod
    def from_json(cls, value: Any) -> Fields:
        """Read a JSON object; absent keys take their defaults.

        Raises:
            InvalidInput: it is no object, or has an unknown key or a bad value.
        """
        if not isinstance(value, dict):
            raise InvalidInput(f"fields must be a JSON object, got {type(value).__name__}")
        unknown = sorted(set(value) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise InvalidInput(f"fields has the unknown key {unknown[0]!r}; known are {known}")
        temperatures = value.get("temperatures", ())
        if not isinstance(temperatures, list | tuple):
            raise InvalidInput(f"fields.temperatures is {temperatures!r}; it must be a list of numbers")
        return cls(**{**value, "temperatures": tuple(temperatures)})

    @property
    def asked(self) -> tuple[Field, ...]:
        """Entries of the table that are asked for."""
        return tuple(each for each in FIELDS if each.is_asked(self))

    @property
    def beside_top_k(self) -> tuple[Field, ...]:
        """Entries of the table that are asked for, without the top-k."""
        return tuple(each for each in self.asked if each is not TOP_K)

    @property
    def label(self) -> str:
        """Name for a segment set with these fields, like `top-64_entropy`."""
        return "_".join((each.label or each.name).format(**asdict(self)) for each in self.asked)

    @property
    def text(self) -> str:
        """Description for people, like `top-64, entropy`."""
        values = {**asdict(self), "temperatures": ", ".join(f"{t:g}" for t in self.temperatures)}
        return ", ".join((each.text or each.label or each.name).format(**values) for each in self.asked)

    @property
    def options(self) -> list[str]:
        """Command-line options that mean exactly these fields."""
        values = {name: value for each in FIELDS for name, value in each.values(self).items()}
        told = {
            name: ",".join(repr(float(t)).removesuffix(".0") for t in value) if isinstance(value, tuple) else value
            for name, value in values.items()
            # Without its option the top-k would have its default.
            if value or name == "k"
        }
        return [option_of(name) + ("" if value is True else f" {value}") for name, value in told.items()]

    @property
    def only_top_k(self) -> bool:
        """True when only the top-k, with its tail mass and label, is asked for."""
        return not self.beside_top_k

    def float_shapes(self, num_positions: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes [P, ...] of the fields that are arrays of floats, by name."""
        shaped = ((each.name, each.shape) for each in self.beside_top_k)
        return {name: (num_positions, *shape(self, vocab_size)) for name, shape in shaped if shape is not None}

    def only(self, kept: Iterable[Field]) -> Fields | None:
        """Reduce to the fields that are among `kept`; None when none is."""
        values = {name: type(getattr(self, name))() for name in self.__dataclass_fields__}
        for each in kept:
            values |= each.values(self)
        return Fields(**values) if any(values.values()) else None

    def without(self, other: Fields) -> Fields | None:
        """Reduce to the fields that `other` does not have; None when it has all of them.

        Raises:
            SpecMismatch: both have the top-k, the draws or the temperatures, but with different values.
        """
        for each in other.asked:
            if each.is_asked(self) and each.values(self) != each.values(other):
                mine, there = (", ".join(map(str, each.values(fields).values())) for fields in (self, other))
                raise SpecMismatch(
                    f"{each.asked_by} {there} is kept already, {mine} was asked for; use another teacher name"
                )
        return self.only(each for each in self.asked if not each.is_asked(other))

    def joined(self, other: Fields) -> Fields:
        """Join with the fields of `other`, none of which these may have (see `without`)."""
        values = {name: value for each in FIELDS for name, value in each.values(other).items()}
        for each in self.asked:
            values |= each.values(self)
        return Fields(**values)

    def bytes_per_position(self, vocab_size: int) -> int:
        """Most bytes of a position in `Targets` with these fields."""
        # N draws are at most V unique ids with counts, and the offset at which a position's begin.
        draws = 8 + 6 * min(self.draws, vocab_size) if self.draws else 0
        # `log_tail` and `label_logprob`, two float32, are always there.
        return 8 + 8 * self.k + draws + 4 * sum(map(math.prod, self.float_shapes(1, vocab_size).values()))


COLUMNS: Mapping[str, Field] = {
    "log_tail": TOP_K,
    "label_logprob": TOP_K,
    **{each.name: each for each in FIELDS if each.is_scalar},
}
"""Arrays of `Targets` with one float a position, and the fields to which they belong."""


def option_of(attribute: str) -> str:
    """Name of the command-line option that sets an attribute of `Fields`."""
    return "--top-k" if attribute == "k" else f"--{attribute}"
