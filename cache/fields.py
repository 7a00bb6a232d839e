"""What is known of each position besides its token: the fields, in one table, and a wish for some of them.

All that stores, sends, counts or names fields goes by `FIELDS`. A further field of floats is an attribute of `Fields`
and one of `Targets`, an entry here and a codec in `potstill.cache.encoding.fields`; how a teacher computes it comes to
that.

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
    """One entry of the table."""

    name: str
    """Its attribute of `Targets`, but for the top-k, which has four; also its name where fields are chosen by name."""
    attributes: Mapping[str, str]
    """Its attributes of `Fields` with the help of their command-line options. When the first is 0, empty or False the
    field is not asked for, and the others mean nothing."""
    shape: Callable[[Fields, int], tuple[int, ...]] | None = None
    """The shape of a position's float32 numbers, given the wish and V; None for what is no plain array of floats."""
    most_bytes: Callable[[Fields, int], int] | None = None
    """The most bytes of a position, given the wish and V, where `shape` does not tell."""
    label: str = ""
    """How a folder's name has it, by default as `name`; attributes of `Fields` stand in braces."""
    text: str = ""
    """How people are told of it, by default as `label`."""

    @property
    def asked_by(self) -> str:
        """The attribute of `Fields` that asks for it."""
        return next(iter(self.attributes))

    @property
    def is_scalar(self) -> bool:
        """Whether it is one float a position."""
        return self.shape is not None and self.shape(Fields(), 1) == ()

    def is_asked(self, fields: Fields) -> bool:
        """Say if it is among `fields`."""
        return bool(getattr(fields, self.asked_by))

    def values(self, fields: Fields) -> dict[str, Any]:
        """Its attributes of `fields`; all without meaning are 0, empty or False when it is not asked for."""
        asked = self.is_asked(fields)
        values = {name: getattr(fields, name) for name in self.attributes}
        return values if asked else {name: type(value)() for name, value in values.items()}

    def serves(self, held: Fields, want: Fields) -> bool:
        """Say if what is held has all that is wanted of this field, which may be nothing."""
        if self is TOP_K:
            return held.k >= want.k
        return not self.is_asked(want) or self.values(held) == self.values(want)

    def num_bytes(self, want: Fields, vocab_size: int) -> int:
        """The most bytes that it takes of a position as arrays."""
        if self.most_bytes is not None:
            return self.most_bytes(want, vocab_size)
        assert self.shape is not None, "a field has a shape or says its bytes"
        return 4 * math.prod(self.shape(want, vocab_size))

    def label_of(self, fields: Fields) -> str:
        """The part of a folder's name that says it is there, like `draws-25`."""
        return (self.label or self.name).format(**self.values(fields))

    def text_of(self, fields: Fields) -> str:
        """A few words of what is there, like `25 draws of seed 3`."""
        values = {
            name: ", ".join(f"{t:g}" for t in value) if isinstance(value, tuple) else value
            for name, value in self.values(fields).items()
        }
        return (self.text or self.label or self.name).format(**values)


TOP_K = Field(
    name="top_k",
    attributes={"k": "entries kept a position, 0 for none (default 64)"},
    most_bytes=lambda want, _: 8 * want.k,
    label="top-{k}",
)
DRAWS = Field(
    name="draws",
    attributes={"draws": "draws with replacement a position", "seed": "of the draws (default 0)"},
    # N draws are at most V unique ids with counts, and the offset at which a position's begin.
    most_bytes=lambda want, vocab_size: 8 + 6 * min(want.draws, vocab_size),
    label="draws-{draws}",
    text="{draws} draws of seed {seed}",
)
FIELDS = (
    TOP_K,
    DRAWS,
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
)
"""The table, in the order in which fields are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What is asked of a teacher, or what a target set holds.

    Raises:
        InvalidInput: a value no teacher could serve, or nothing at all.
    """

    k: int = 64
    """Top-k entries; they come with the tail and the label's logprob. 0 for none of the three."""
    draws: int = 0
    """Draws with replacement a position (Sparse Logit Sampling, arXiv 2503.16870)."""
    seed: int = 0
    """Of the draws; it means nothing without them."""
    entropy: bool = False
    temperatures: tuple[float, ...] = ()
    """Of each T, log of the sum of p**(1/T)."""
    dense: bool = False
    """All V logprobs: for small evaluation splits."""

    def __post_init__(self) -> None:
        # As `from_json` has it, so that fields equal their round trip.
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise InvalidInput(f"fields.k is {self.k!r}; it must be a whole number of at least 0")
        if not self.asked:
            *others, last = (each.asked_by for each in FIELDS if each is not TOP_K)
            raise InvalidInput(f"fields ask for nothing: k is 0 and no {', '.join(others)} or {last}")
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or not 0 <= self.draws < 2**16:
            raise InvalidInput(f"fields.draws is {self.draws!r}; it must be a whole number in [0, 65535]")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InvalidInput(f"fields.seed is {self.seed!r}; it must be a whole number in [0, 2**63)")
        for t in self.temperatures:
            if not isinstance(t, float | int) or isinstance(t, bool) or not 0 < t <= sys.float_info.max:
                raise InvalidInput(f"fields.temperatures has {t!r}; each must be a positive number")
        for name, attribute in self.__dataclass_fields__.items():
            if attribute.default is False and not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"fields.{name} is {getattr(self, name)!r}; it must be true or false")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one key per attribute."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, value: Any) -> Fields:
        """Read a JSON object; absent keys take their defaults.

        Raises:
            InvalidInput: not an object, an unknown key or a bad value.
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
        """The entries of the table that are asked for."""
        return tuple(each for each in FIELDS if each.is_asked(self))

    @property
    def beside_top_k(self) -> tuple[Field, ...]:
        """The entries of the table that are asked for, without the top-k."""
        return tuple(each for each in self.asked if each is not TOP_K)

    @property
    def label(self) -> str:
        """The last part of a segment set's path that says what it holds, like `top-64_entropy`."""
        return "_".join(each.label_of(self) for each in self.asked)

    @property
    def text(self) -> str:
        """What there is, in a few words for people."""
        return ", ".join(each.text_of(self) for each in self.asked)

    @property
    def options(self) -> list[str]:
        """The command-line options that mean these fields and no others."""
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
        """Whether nothing beside the top-k, its tail and the label is asked for."""
        return not self.beside_top_k

    def float_shapes(self, num_positions: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape over so many positions of the fields that are plain arrays of floats."""
        shaped = ((each.name, each.shape) for each in self.beside_top_k)
        return {name: (num_positions, *shape(self, vocab_size)) for name, shape in shaped if shape is not None}

    def only(self, kept: Iterable[Field]) -> Fields | None:
        """Those of these fields that are `kept` too, or None when there are none."""
        values = {name: type(getattr(self, name))() for name in self.__dataclass_fields__}
        for each in kept:
            values |= each.values(self)
        return Fields(**values) if any(values.values()) else None

    def without(self, other: Fields) -> Fields | None:
        """What of these fields `other` does not have, or None when it has all of them.

        Raises:
            SpecMismatch: both have the top-k, the draws or the temperatures, but not the same ones.
        """
        for each in other.asked:
            mine, there = (_plain(each.values(fields)) for fields in (self, other))
            if each.is_asked(self) and mine != there:
                raise SpecMismatch(
                    f"{each.asked_by} {there} is kept already, {mine} was asked for; use another teacher name"
                )
        return self.only(each for each in self.asked if not each.is_asked(other))

    def joined(self, other: Fields) -> Fields:
        """Both together; `other` has only what these have not (`without`)."""
        values = {name: value for each in FIELDS for name, value in each.values(other).items()}
        for each in self.asked:
            values |= each.values(self)
        return Fields(**values)

    def bytes_per_position(self, vocab_size: int) -> int:
        """What `Targets` of these fields hold of a position at most; the tail and the label are always there."""
        return 8 + sum(each.num_bytes(self, vocab_size) for each in self.asked)


COLUMNS: Mapping[str, Field] = {
    "log_tail": TOP_K,
    "label_logprob": TOP_K,
    **{each.name: each for each in FIELDS if each.is_scalar},
}
"""The arrays of `Targets` with one float a position, and the fields that they belong to."""


def option_of(attribute: str) -> str:
    """The command-line option that sets an attribute of `Fields`."""
    return "--top-k" if attribute == "k" else f"--{attribute}"


def _plain(values: Mapping[str, Any]) -> Any:
    """The value of one attribute, or those of several as a tuple."""
    several = tuple(values.values())
    return several[0] if len(several) == 1 else several
