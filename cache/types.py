"""The vocabulary every package shares: what a teacher is, what is asked of it, what it answers.

Shape legend:  P positions, K kept entries, V vocabulary size, N draws.
Logprobs are natural logs of the full-vocabulary softmax at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from cache.errors import FormatError, InvalidInput, UnsupportedField

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Tokens: TypeAlias = NDArray[np.uint32]
"""One row: token ids, shape [T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherIdentity:
    """What changes a teacher's numbers. Another identity under the same name raises `SpecMismatch`."""

    model: str
    revision: str
    weights_sha256: str
    tokenizer_sha256: str
    """Of the id -> bytes table and the special ids, not of files (`cache.tokenizer.fingerprint`)."""
    vocab_size: int
    dtype: str
    head_dtype: str
    quantization: str = "none"
    adapters: tuple[str, ...] = ()
    overrides: Mapping[str, JSON] = field(default_factory=dict)
    prefix_ids: tuple[int, ...] = ()
    """Put in front of every row before the teacher sees it (BOS); their targets are dropped."""

    def __post_init__(self) -> None:
        # As JSON has it, so that an identity equals its round trip.
        object.__setattr__(self, "overrides", _plain(self.overrides))

    def to_json(self) -> dict[str, JSON]:
        """A JSON object that `from_json` reads back to an equal identity."""
        return cast("dict[str, JSON]", _plain(asdict(self)))

    @classmethod
    def from_json(cls, value: Any) -> TeacherIdentity:
        """Read what `to_json` wrote.

        Raises:
            FormatError: a key is missing, unknown or of the wrong type.
        """
        if not isinstance(value, dict):
            raise FormatError(f"a teacher identity must be a JSON object, got {type(value).__name__}")
        try:
            tuples = {name: tuple(value.get(name, ())) for name in ("adapters", "prefix_ids")}
            identity = cls(**{**value, **tuples})
        except TypeError as error:
            raise FormatError(f"a teacher identity has wrong keys: {error}") from error
        if not isinstance(identity.vocab_size, int) or identity.vocab_size < 1:
            raise FormatError(f"a teacher identity has vocab_size {identity.vocab_size!r}; it must be > 0")
        return identity

    def differences(self, other: TeacherIdentity) -> str:
        """`key: ours != theirs` for every key that differs, or an empty string."""
        mine, theirs = self.to_json(), other.to_json()
        return "; ".join(f"{key}: {mine[key]!r} != {theirs[key]!r}" for key in mine if mine[key] != theirs[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What produced some targets. Recorded per segment, never compared."""

    engine: str
    engine_version: str
    device: str
    capture_path: str
    captured_at: str = ""
    """ISO 8601, UTC; set when a segment is committed."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        return cast("dict[str, JSON]", _plain(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Provenance:
        """Read what `to_json` wrote; unknown keys, of a newer writer, are ignored."""
        names = ("engine", "engine_version", "device", "capture_path", "captured_at")
        return cls(**{name: str(value.get(name, "")) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What is asked of a teacher, or what a target set holds.

    Raises:
        InvalidInput: a value no teacher could serve.
    """

    k: int = 64
    draws: int = 0
    seed: int = 0
    entropy: bool = False
    temperatures: tuple[float, ...] = ()
    dense: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InvalidInput(f"fields.k is {self.k!r}; it must be a whole number of at least 1")
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 0:
            raise InvalidInput(f"fields.draws is {self.draws!r}; it must be a whole number of at least 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InvalidInput(f"fields.seed is {self.seed!r}; it must be a whole number in [0, 2**63)")
        for t in self.temperatures:
            if not isinstance(t, float | int) or isinstance(t, bool) or not 0 < t < float("inf"):
                raise InvalidInput(f"fields.temperatures has {t!r}; each must be a positive number")
        for name in ("entropy", "dense"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"fields.{name} is {getattr(self, name)!r}; it must be true or false")

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        return cast("dict[str, JSON]", _plain(asdict(self)))

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
    def only_top_k(self) -> bool:
        """Whether nothing beside the top-k, its tail and the label is asked for."""
        return not (self.draws or self.entropy or self.temperatures or self.dense)

    def require_only_top_k(self, who: str) -> None:
        """Raise `UnsupportedField`, naming `who`, when more than the top-k is asked for."""
        if not self.only_top_k:
            asked = [n for n in ("draws", "entropy", "temperatures", "dense") if getattr(self, n)]
            raise UnsupportedField(f"{who} holds the top-k only; {', '.join(asked)} is not there: ask without it")


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """A teacher's next-token distributions for one or many rows, flat on the position axis.

    Target *t* of a row is the distribution of the token after `row[t]`: a row of T tokens has T
    targets, and the last has no label.
    """

    ids: NDArray[np.uint32]
    """[P, K] token ids by falling logprob."""
    logprobs: NDArray[np.float32]
    """[P, K] nats."""
    log_tail: NDArray[np.float32]
    """[P] log of the mass outside `ids`; -inf for none."""
    label_logprob: NDArray[np.float32]
    """[P] logprob of the row's own next token; NaN where there is none."""
    entropy: NDArray[np.float32] | None = None
    """[P] nats, or None when not asked for."""
    log_z: NDArray[np.float32] | None = None
    """[P, temperatures] log of the sum of p**(1/T), or None."""
    dense: NDArray[np.float32] | None = None
    """[P, V] logprobs, or None."""

    def __post_init__(self) -> None:
        num_positions, k = self.ids.shape
        assert self.logprobs.shape == (num_positions, k), "logprobs do not match ids"
        assert self.log_tail.shape == (num_positions,), "log_tail does not match ids"
        assert self.label_logprob.shape == (num_positions,), "label_logprob does not match ids"

    @property
    def num_positions(self) -> int:
        """P."""
        return int(self.ids.shape[0])

    @property
    def k(self) -> int:
        """K."""
        return int(self.ids.shape[1])

    def __getitem__(self, positions: slice) -> Targets:
        """The same fields of a range of positions, as views."""
        part: dict[str, Any] = {
            name: None if array is None else array[positions] for name, array in self._arrays().items()
        }
        return Targets(**part)

    def prefix(self, k: int) -> Targets:
        """The top `k` of the kept K; the mass that is dropped moves into the tail.

        Raises:
            UnsupportedField: `k` is more than is kept.
        """
        if k < 1:
            raise InvalidInput(f"k is {k}; it must be at least 1")
        if k > self.k:
            raise UnsupportedField(f"k={k} was asked for, but only k={self.k} is kept; ask for at most {self.k}")
        if k == self.k:
            return self
        dropped = np.logaddexp.reduce(self.logprobs[:, k:].astype(np.float64), axis=1)
        log_tail = np.logaddexp(self.log_tail.astype(np.float64), dropped)
        return Targets(
            **{
                **self._arrays(),
                "ids": self.ids[:, :k],
                "logprobs": self.logprobs[:, :k],
                "log_tail": np.minimum(log_tail, 0.0).astype(np.float32),
            }
        )

    @staticmethod
    def concat(parts: Sequence[Targets]) -> Targets:
        """All positions of `parts`, one after the other; every part has the same fields and K."""
        assert parts, "nothing to join"
        if len(parts) == 1:
            return parts[0]
        columns = {name: [part._arrays()[name] for part in parts] for name in parts[0]._arrays()}  # noqa: SLF001
        joined: dict[str, Any] = {
            name: None if column[0] is None else np.concatenate(column) for name, column in columns.items()
        }
        return Targets(**joined)

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLimits:
    """What a teacher accepts; more raises `LimitExceeded`. None is no limit of its own."""

    max_top_k: int | None = None
    max_row_tokens: int | None = None


class Teacher(Protocol):
    """Scores rows of tokens: the engine, the replica pool, the cache, the HTTP client all are one."""

    @property
    def identity(self) -> TeacherIdentity:
        """What changes this teacher's numbers."""
        ...

    @property
    def provenance(self) -> Provenance:
        """What produces this teacher's numbers right now."""
        ...

    @property
    def limits(self) -> TeacherLimits:
        """What this teacher accepts."""
        ...

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """One `Targets` per row, in order, each with as many positions as its row has tokens.

        Raises:
            LimitExceeded: a row longer than the context, an id over the vocabulary, K over the limit.
            UnsupportedField: a field this teacher cannot give.
        """
        ...


def _plain(value: Any) -> JSON:
    """Tuples as lists and mappings as dicts, so that a value equals its JSON round trip."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return cast("JSON", value)
