"""The vocabulary that all packages share: teachers, the fields that are asked of them, and the targets they answer.

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
from potstill.cache.fields import (
    FIELDS,
    TOP_K,
    Fields as Fields,  # noqa: PLC0414 -- handed on with the rest of the vocabulary
)
from potstill.cache.lineage import Step, path_and_steps

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Tokens: TypeAlias = NDArray[np.uint32]
"""One row of T token ids, [T] uint32."""


CONFIG_SHA256 = "config_sha256"
"""Key of `TeacherIdentity.overrides`."""
PROJECTED_FROM = "projected_from"
"""Key of `TeacherIdentity.overrides`: what the teacher itself has where its targets are projected."""
ALIGNMENT = ("unresolved", "chunk_logprob", "chunk_tokens")
"""Columns of `Targets.alignment`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherIdentity:  # noqa: PLW1641 -- `overrides` has no hash
    """Everything that changes a teacher's numbers. Another identity under the same name raises `SpecMismatch`."""

    model: str
    """Label for people: the name of the model's folder, or its name on the hub."""
    revision: str
    weights_sha256: str
    """Hash over the weight files, in hex. An import that does not know it has a word here; then `model` is compared."""
    tokenizer_sha256: str
    """Fingerprint of the table from ids to bytes (`potstill.cache.corpus.tokenizer.fingerprint`), not of files."""
    vocab_size: int
    dtype: str
    head_dtype: str
    quantization: str = "none"
    adapters: tuple[str, ...] = ()
    overrides: Mapping[str, JSON] = field(default_factory=dict)
    """Settings beside the weights that change numbers: under `CONFIG_SHA256` the hash of the model's configuration.
    Where one of two identities has none (an earlier version, an import), it is not compared."""
    prefix_ids: tuple[int, ...] = ()
    """Token ids, such as BOS, that are put in front of every row for the teacher; their targets are dropped."""

    def __post_init__(self) -> None:
        # In JSON's types, so that an identity equals its round trip.
        object.__setattr__(self, "overrides", _plain(self.overrides))

    def to_json(self) -> dict[str, JSON]:
        """Convert to a JSON object, from which `from_json` makes an equal identity."""
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

    def projected(self, tokenizer_sha256: str, vocab_size: int) -> TeacherIdentity:
        """Make the identity of targets projected from this teacher's, over the ids of another tokenizer.

        No prefix is in front of rows of that tokenizer.
        """
        own = {name: getattr(self, name) for name in ("tokenizer_sha256", "vocab_size", "prefix_ids")}
        overrides = {**self.overrides, PROJECTED_FROM: _plain(own)}
        return replace(
            self, tokenizer_sha256=tokenizer_sha256, vocab_size=vocab_size, prefix_ids=(), overrides=overrides
        )

    @property
    def source(self) -> TeacherIdentity:
        """Identity of the teacher itself, from which projected targets came; this one where they are its own."""
        own = self.overrides.get(PROJECTED_FROM)
        if not isinstance(own, dict):
            return self
        overrides = {name: value for name, value in self.overrides.items() if name != PROJECTED_FROM}
        return TeacherIdentity.from_json({**self.to_json(), **own, "overrides": overrides})

    def differences(self, other: TeacherIdentity) -> str:
        """List the keys that differ as `key: ours != theirs`; an empty string when none does."""
        mine, theirs = self.to_json(), other.to_json()
        # A model may be renamed or moved: with a hash of its weights its name says nothing more.
        if re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            del mine["model"]
        if (CONFIG_SHA256 in self.overrides) != (CONFIG_SHA256 in other.overrides):
            for each in (mine, theirs):
                cast("dict[str, JSON]", each["overrides"]).pop(CONFIG_SHA256, None)
        return "; ".join(f"{key}: {mine[key]!r} != {theirs[key]!r}" for key in mine if mine[key] != theirs[key])

    def __eq__(self, other: object) -> bool:
        """Compare all that changes numbers."""
        return isinstance(other, TeacherIdentity) and not self.differences(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Record of what produced some targets. It is kept with every segment, and never compared."""

    engine: str
    engine_version: str
    device: str
    capture_path: str
    captured_at: str = ""
    """Time in ISO 8601, UTC; set when a segment is committed."""
    steps: tuple[Step, ...] = ()
    """Encodings that the targets went through before they were handed to the present one."""

    @property
    def whole_path(self) -> str:
        """The capture path, followed by the steps in words."""
        return ", ".join(filter(None, (self.capture_path, *map(str, self.steps))))

    def to_json(self) -> dict[str, JSON]:
        """Convert to a JSON object with one key per attribute; `steps` is left out when there are none."""
        plain = cast("dict[str, JSON]", _plain(asdict(self)))
        return plain if self.steps else {name: plain[name] for name in plain if name != "steps"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Provenance:
        """Read what `to_json` wrote; unknown keys, of a newer writer, are ignored.

        Raises:
            FormatError: the steps cannot be read.
        """
        told = {name: str(value.get(name, "")) for name in ("engine", "engine_version", "device", "captured_at")}
        capture_path, steps = path_and_steps(str(value.get("capture_path", "")), value.get("steps"))
        return cls(**told, capture_path=capture_path, steps=steps)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Draws:
    """N draws with replacement at each position, as unique ids with counts, in ragged arrays."""

    offsets: NDArray[np.int64]
    """[P+1] position p has the ids `offsets[p]` to `offsets[p + 1]`; the first is 0."""
    ids: NDArray[np.uint32]
    """[U] token ids, rising and unique within a position."""
    counts: NDArray[np.uint16]
    """[U] number of times each id was drawn, at least 1; a position's sum is N."""

    def __post_init__(self) -> None:
        assert self.ids.shape == self.counts.shape == (int(self.offsets[-1] - self.offsets[0]),), "ragged draws"

    def __repr__(self) -> str:
        """Describe the draws in one short line, without numbers."""
        return f"Draws(positions={len(self.offsets) - 1}, ids={len(self.ids)})"

    def __getitem__(self, positions: slice) -> Draws:
        """The draws of a range of positions; ids and counts are views."""
        start, stop, step = positions.indices(len(self.offsets) - 1)
        assert step == 1, "a range of positions"
        offsets = self.offsets[start : max(start, stop) + 1]
        inside = slice(int(offsets[0]), int(offsets[-1]))
        return Draws(offsets - offsets[0], self.ids[inside], self.counts[inside])

    @staticmethod
    def concat(parts: Sequence[Draws]) -> Draws:
        """Concatenate the positions of all parts."""
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
        ids, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "counts"))
        return Draws(offsets, ids, counts)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Targets:
    """A teacher's next-token distributions for one or many rows, flat on the position axis.

    Target *t* of a row is the distribution of the token after `row[t]`: a row of T tokens has T targets, and the last
    one has no label.
    """

    ids: NDArray[np.uint32]
    """[P, K] token ids by falling logprob."""
    logprobs: NDArray[np.float32]
    """[P, K] natural logs of the probabilities of `ids`."""
    log_tail: NDArray[np.float32]
    """[P] tail mass: log of the probability of all tokens outside `ids`; -inf for none."""
    label_logprob: NDArray[np.float32]
    """[P] logprob of the row's own next token; NaN where there is none."""
    entropy: NDArray[np.float32] | None = None
    """[P] entropy in nats; None, as for all fields below, when it was not asked for."""
    log_z: NDArray[np.float32] | None = None
    """[P, temperatures] log of the sum of p**(1/T) over the vocabulary, for each temperature T."""
    dense: NDArray[np.float32] | None = None
    """[P, V] logprobs of all tokens."""
    draws: Draws | None = None
    """N draws with replacement at each position."""
    alignment: NDArray[np.float32] | None = None
    """[P, 3] of targets projected from another tokenizer's, in the order of `ALIGNMENT`:

    the mass of the top-k and tail of which it is not known which id it is of, and which is in the tail;
    the teacher's log-likelihood of the chunk of text that ends with the row's next token, 0 where none does;
    how many tokens of the row the chunk has, that one being the last, 0 where none ends.
    """

    def __post_init__(self) -> None:
        num_positions, k = self.ids.shape
        assert self.logprobs.shape == (num_positions, k), "logprobs do not match ids"
        assert self.log_tail.shape == (num_positions,), "log_tail does not match ids"
        assert self.label_logprob.shape == (num_positions,), "label_logprob does not match ids"
        assert self.draws is None or len(self.draws.offsets) == num_positions + 1, "draws do not match ids"

    @property
    def num_positions(self) -> int:
        """Number of positions P."""
        return int(self.ids.shape[0])

    @property
    def k(self) -> int:
        """Number of kept entries K at a position."""
        return int(self.ids.shape[1])

    def __getitem__(self, positions: slice) -> Targets:
        """Targets of a range of positions, as views."""
        part: dict[str, Any] = {
            name: None if array is None else array[positions] for name, array in self._arrays().items()
        }
        return Targets(**part)

    def __repr__(self) -> str:
        """Describe the targets in one short line, without numbers."""
        fields = ",".join(self.beside_top_k)
        return f"Targets(positions={self.num_positions}, k={self.k}{', fields=' if fields else ''}{fields})"

    @property
    def beside_top_k(self) -> dict[str, Any]:
        """Arrays (or `Draws`) of the fields that are there beside the top-k, by name."""
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
        """Cut the top-k to its first `k` entries; the mass of the others moves into the tail.

        Raises:
            UnsupportedField: `k` is more than K.
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
        """Drop the top-k: K becomes 0, all mass is in the tail, and no label has a logprob."""
        return Targets.of_other_fields(self.num_positions, **self.beside_top_k)

    def only(self, fields: Fields) -> Targets:
        """Keep the given fields, as far as they are here; the top-k is kept whole or not at all."""
        held = self if fields.k else self.without_top_k()
        names = {each.name for each in fields.beside_top_k}
        left_out: dict[str, Any] = {name: None for name in self.beside_top_k if name not in names}
        return replace(held, **left_out)

    def with_fields_of(self, other: Targets) -> Targets:
        """Join the fields of two targets of the same positions, of which at most one has a top-k."""
        top_k, more = (self, other) if self.k else (other, self)
        return replace(top_k, **more.beside_top_k)

    @staticmethod
    def of_other_fields(num_positions: int, **fields: Any) -> Targets:
        """Make targets without a top-k: K is 0, all mass is in the tail, and no label has a logprob."""
        return Targets(
            ids=np.empty((num_positions, 0), np.uint32),
            logprobs=np.empty((num_positions, 0), np.float32),
            log_tail=np.zeros(num_positions, np.float32),
            label_logprob=np.full(num_positions, np.nan, np.float32),
            **fields,
        )

    @staticmethod
    def concat(parts: Sequence[Targets]) -> Targets:
        """Concatenate the positions of all parts, which must have the same fields and K."""
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
    """Limits of what a teacher accepts; more raises `LimitExceeded`. None means no limit of its own."""

    max_top_k: int | None = None
    max_row_tokens: int | None = None


class Teacher(Protocol):
    """Anything that scores rows of tokens: an engine, a replica pool, a cache in front of one, an HTTP client."""

    @property
    def identity(self) -> TeacherIdentity:
        """Identity of the teacher, which changes when its numbers can."""

    @property
    def provenance(self) -> Provenance:
        """Engine and device that produce the teacher's numbers right now."""

    @property
    def limits(self) -> TeacherLimits:
        """Limits of what the teacher accepts."""

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score rows: one `Targets` per row, in order, each with as many positions as its row has tokens.

        Raises:
            LimitExceeded: a row is longer than the context, an id is over the vocabulary, or K over the limit.
            UnsupportedField: the teacher cannot give a field.
        """


def folded_tail(log_tail: NDArray[np.float32], dropped: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log [P] of the mass of a tail and of the logprobs [P, D] that are dropped into it."""
    # log-sum-exp: the largest is subtracted first, which is the tail or, as logprobs fall, the first dropped one.
    top = np.maximum(log_tail, dropped[:, 0]).astype(np.float64)
    top = np.where(np.isneginf(top), 0.0, top)
    mass = np.exp(dropped - top[:, None]).sum(axis=1) + np.exp(log_tail - top)
    with np.errstate(divide="ignore"):
        folded: NDArray[np.float32] = np.minimum(np.log(mass) + top, 0.0).astype(np.float32)
    return folded


def _concat(column: list[Any]) -> Any:
    return Draws.concat(column) if isinstance(column[0], Draws) else np.concatenate(column)


def _plain(value: Any) -> JSON:
    """Convert tuples to lists and mappings to dicts, so that a value equals its JSON round trip."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return cast("JSON", value)
