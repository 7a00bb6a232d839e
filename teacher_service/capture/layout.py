"""The messages between the caller of the engine and its worker on the capture path `sampler`.

The worker computes from the full distributions while they are still in its memory, and sends three flat arrays
through the tensors that vLLM transports for prompt logprobs:

    ids     int32    [T, K] top-k ids by falling logprob
    floats  float32  the sections of `float_sections`, one after the other
    ints    int32    [T] the row's tokens as the worker saw them; with draws also [T] unique ids a position, [U] ids,
                     [U] counts

A failure inside the worker is sent without floats and with its message as UTF-8 bytes in `ints`, so that it fails one
row and not the engine. Sections are contiguous, so that either side works on views. Plain numpy, because both import
this module.

Shape legend:  T tokens of a row without its prefix, K kept entries, V vocabulary size, U unique ids among the draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.types import Fields

_KEY = "potstill"
Sections = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One row as the engine gets it, and the fields that are asked of the worker. It travels with the request."""

    tokens: list[int]
    """[P] tokens of prefix and row."""
    num_prefix: int
    """Tokens in front of the row, whose targets are not wanted."""
    want: Fields

    def to_extra_args(self) -> dict[str, Any]:
        """All but the tokens, as `SamplingParams.extra_args`."""
        return {_KEY: {"fields": self.want.to_json(), "num_prefix": self.num_prefix}}

    @classmethod
    def from_request(cls, tokens: list[int] | None, extra_args: Mapping[str, Any] | None) -> Asked | None:
        """Read a request that reached the worker; None when it is not one of ours, and left to vLLM.

        Raises:
            InvalidInput: fields that `to_extra_args` would not write.
        """
        value = (extra_args or {}).get(_KEY)
        if value is None or tokens is None:
            return None
        return cls(tokens=tokens, num_prefix=int(value["num_prefix"]), want=Fields.from_json(value["fields"]))


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """The worker's arrays for one request, as they arrived."""

    ids: NDArray[np.int32]
    floats: NDArray[np.float32]
    ints: NDArray[np.generic]


class Drawn(NamedTuple):
    """Draws with replacement of S rows, one row after the other."""

    lengths: NDArray[np.int64]
    """[S] unique ids of each row."""
    ids: NDArray[np.int32]
    """[U] ids, rising within a row."""
    counts: NDArray[np.int32]
    """[U] draws of each id."""


def float_sections(want: Fields, num_positions: int, vocab_size: int) -> Sections:
    """Name -> shape of the parts of `Captured.floats`, in their order.

    `top` is the largest logprob of each position: NaN when the logits hold a NaN, a +inf or nothing but -inf.
    """
    sections: Sections = {"top": (num_positions,)}
    if want.k:
        sections |= {"logprobs": (num_positions, want.k), "label_logprob": (num_positions,)}
    return sections | want.float_shapes(num_positions, vocab_size)


def num_floats(sections: Sections) -> int:
    """Number of elements of all sections."""
    return sum(int(np.prod(shape)) for shape in sections.values())


def split(flat: Any, sections: Sections) -> dict[str, Any]:
    """Cut a flat numpy array or torch tensor of `num_floats` elements into views, by name."""
    parts: dict[str, Any] = {}
    start = 0
    for name, shape in sections.items():
        size = int(np.prod(shape))
        parts[name] = flat[start : start + size].reshape(shape)
        start += size
    return parts
