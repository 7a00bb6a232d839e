"""The vocabulary every package shares: what a teacher is, what is asked of it, what it answers.

Shape legend:  P positions, K kept entries, V vocabulary size, N draws, U unique ids among the draws of all positions.
Logprobs are natural logs of the full-vocabulary softmax at temperature 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import FormatError, InvalidInput, UnsupportedField
from potstill.cache.fields import FIELDS, TOP_K, Fields
from potstill.cache.lineage import Step, path_and_steps

__all__ = [
    "JSON",
    "Draws",
    "Fields",
    "Provenance",
    "Targets",
    "Teacher",
    "TeacherIdentity",
    "TeacherLimits",
    "Tokens",
    "folded_tail",
]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Tokens: TypeAlias = NDArray[np.uint32]
"""One row: token ids, shape [T]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherIdentity:  # noqa: PLW1641 -- `overrides` has no hash
    """What changes a teacher's numbers. Another identity under the same name raises `SpecMismatch`."""

    model: str
    """A label for people: the name of the model's folder, or its name on the hub."""
    revision: str
    weights_sha256: str
    """In hex, over the weight files; an import that does not know it has a word here, and `model` is compared, too."""
    tokenizer_sha256: str
    """Of the id -> bytes table and the special ids, not of files (`potstill.cache.corpus.tokenizer.fingerprint`)."""
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
        if not isinstance(identity.weights_sha256, str):
            raise FormatError(f"a teacher identity has weights_sha256 {identity.weights_sha256!r}; it must be a string")
        if not isinstance(identity.vocab_size, int) or identity.vocab_size < 1:
            raise FormatError(f"a teacher identity has vocab_size {identity.vocab_size!r}; it must be > 0")
        return identity

    def differences(self, other: TeacherIdentity) -> str:
        """`key: ours != theirs` for every key that differs, or an empty string; the label `model` is none of them."""
        mine, theirs = self.to_json(), other.to_json()
        if re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            del mine["model"]
        return "; ".join(f"{key}: {mine[key]!r} != {theirs[key]!r}" for key in mine if mine[key] != theirs[key])

    def __eq__(self, other: object) -> bool:
        """Equality of all that changes numbers."""
        return isinstance(other, TeacherIdentity) and not self.differences(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What produced some targets. Recorded per segment, never compared."""

    engine: str
    engine_version: str
    device: str
    capture_path: str
    captured_at: str = ""
    """ISO 8601, UTC; set when a segment is committed."""
    steps: tuple[Step, ...] = ()
    """Encodings that they went through since."""

    @property
    def whole_path(self) -> str:
        """The capture path and the steps behind it, in words."""
        return ", ".join(filter(None, (self.capture_path, *map(str, self.steps))))

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute; none for `steps` when there are none."""
        plain = cast("dict[str, JSON]", _plain(asdict(self)))
        return plain if self.steps else {name: plain[name] for name in plain if name != "steps"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Provenance:
        """Read what `to_json` wrote; unknown keys, of a newer writer, are ignored.

        Raises:
            FormatError: steps that cannot be read.
        """
        told = {name: str(value.get(name, "")) for name in ("engine", "engine_version", "device", "captured_at")}
        capture_path, steps = path_and_steps(str(value.get("capture_path", "")), value.get("steps"))
        return cls(**told, capture_path=capture_path, steps=steps)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Draws:
    """N draws with replacement of each position, as unique ids with counts; ragged."""

    offsets: NDArray[np.int64]
    """[P+1] where each position's ids begin, and their end; the first is 0."""
    ids: NDArray[np.uint32]
    """[U] unique within a position, rising."""
    counts: NDArray[np.uint16]
    """[U] how often each was drawn, at least once; a position's sum is N."""

    def __post_init__(self) -> None:
        assert self.ids.shape == self.counts.shape == (int(self.offsets[-1] - self.offsets[0]),), "ragged draws"

    def __repr__(self) -> str:
        """One short line, without numbers."""
        return f"Draws(positions={len(self.offsets) - 1}, ids={len(self.ids)})"

    def __getitem__(self, positions: slice) -> Draws:
        """The draws of a range of positions; ids and counts as views."""
        start, stop, step = positions.indices(len(self.offsets) - 1)
        assert step == 1, "a range of positions"
        offsets = self.offsets[start : max(start, stop) + 1]
        inside = slice(int(offsets[0]), int(offsets[-1]))
        return Draws(offsets - offsets[0], self.ids[inside], self.counts[inside])

    @staticmethod
    def concat(parts: Sequence[Draws]) -> Draws:
        """All positions of `parts`, one after the other."""
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
        ids, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "counts"))
        return Draws(offsets, ids, counts)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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
    draws: Draws | None = None
    """N draws with replacement, or None."""

    def __post_init__(self) -> None:
        num_positions, k = self.ids.shape
        assert self.logprobs.shape == (num_positions, k), "logprobs do not match ids"
        assert self.log_tail.shape == (num_positions,), "log_tail does not match ids"
        assert self.label_logprob.shape == (num_positions,), "label_logprob does not match ids"
        assert self.draws is None or len(self.draws.offsets) == num_positions + 1, "draws do not match ids"

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

    def __repr__(self) -> str:
        """One short line, without numbers."""
        fields = ",".join(self.beside_top_k)
        return f"Targets(positions={self.num_positions}, k={self.k}{', fields=' if fields else ''}{fields})"

    @property
    def beside_top_k(self) -> dict[str, Any]:
        """Name -> array, or `Draws`, of the fields that are there beside the top-k."""
        arrays = {each.name: getattr(self, each.name) for each in FIELDS if each is not TOP_K}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays; the offsets of draws are not counted."""
        arrays: dict[str, Any] = self._arrays()
        if self.draws is not None:
            arrays |= {"drawn": self.draws.ids, "counts": self.draws.counts}
        return sum(array.nbytes for array in arrays.values() if isinstance(array, np.ndarray))

    def prefix(self, k: int) -> Targets:
        """The top `k` of the kept K; the mass that is dropped moves into the tail.

        Raises:
            UnsupportedField: `k` is more than is kept.
        """
        if k < 0:
            raise InvalidInput(f"k is {k}; it must be at least 0")
        if k > self.k:
            raise UnsupportedField(f"k={k} was asked for, but only k={self.k} is kept; ask for at most {self.k}")
        if k == self.k:
            return self
        if k == 0:
            return self.without_top_k()
        return replace(
            self,
            ids=self.ids[:, :k],
            logprobs=self.logprobs[:, :k],
            log_tail=folded_tail(self.log_tail, self.logprobs[:, k:]),
        )

    def without_top_k(self) -> Targets:
        """The other fields alone: K is 0, all mass is in the tail, and no label has a logprob."""
        return Targets.of_other_fields(self.num_positions, **self.beside_top_k)

    def only(self, fields: Fields) -> Targets:
        """What is here of `fields`; all of the top-k, or none of it."""
        held = self if fields.k else self.without_top_k()
        names = {each.name for each in fields.beside_top_k}
        left_out: dict[str, Any] = {name: None for name in self.beside_top_k if name not in names}
        return replace(held, **left_out)

    def with_fields_of(self, other: Targets) -> Targets:
        """These and what `other` has besides; one of the two has a top-k at most."""
        top_k, more = (self, other) if self.k else (other, self)
        return replace(top_k, **more.beside_top_k)

    @staticmethod
    def of_other_fields(num_positions: int, **fields: Any) -> Targets:
        """Targets without a top-k: K is 0, all mass is in the tail, and no label has a logprob."""
        return Targets(
            ids=np.empty((num_positions, 0), np.uint32),
            logprobs=np.empty((num_positions, 0), np.float32),
            log_tail=np.zeros(num_positions, np.float32),
            label_logprob=np.full(num_positions, np.nan, np.float32),
            **fields,
        )

    @staticmethod
    def concat(parts: Sequence[Targets]) -> Targets:
        """All positions of `parts`, one after the other; every part has the same fields and K."""
        assert parts, "nothing to join"
        if len(parts) == 1:
            return parts[0]
        columns = {name: [part._arrays()[name] for part in parts] for name in parts[0]._arrays()}  # noqa: SLF001
        joined: dict[str, Any] = {
            name: None if column[0] is None else _concat(column) for name, column in columns.items()
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


def folded_tail(log_tail: NDArray[np.float32], dropped: NDArray[np.float32]) -> NDArray[np.float32]:
    """[P] log of a tail's mass and that of the [P, D] logprobs dropped into it."""
    # All in one exp: the largest of the dropped ones is first, or the tail is.
    top = np.maximum(log_tail, dropped[:, 0]).astype(np.float64)
    top = np.where(np.isneginf(top), 0.0, top)
    mass = np.exp(dropped - top[:, None]).sum(axis=1) + np.exp(log_tail - top)
    with np.errstate(divide="ignore"):
        folded: NDArray[np.float32] = np.minimum(np.log(mass) + top, 0.0).astype(np.float32)
    return folded


def _concat(column: list[Any]) -> Any:
    return Draws.concat(column) if isinstance(column[0], Draws) else np.concatenate(column)


def _plain(value: Any) -> JSON:
    """Tuples as lists and mappings as dicts, so that a value equals its JSON round trip."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return cast("JSON", value)
