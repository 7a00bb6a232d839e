"""DistillKit's `logprob_compressor` settings, without which its compressed bytes cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_named
from potstill.cache.store.root import store_errors

CONFIG_NAME = "compression_config.yaml"
"""Name that DistillKit's capture gives the file, beside the Parquet files."""

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SPECIAL_TERMS = ("sqrt", "exp")
# More bits than these cannot be told apart in the float32 numbers they are made of.
_MOST_BITS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualBin:
    """A run of residuals that share one scale.

    Raises:
        InvalidInput: a value is out of range.
    """

    scale_dtype: str
    element_bits: int
    num_elements: int

    def __post_init__(self) -> None:
        _require_dtype("scale_dtype", self.scale_dtype)
        _require_whole("element_bits", self.element_bits, 1, _MOST_BITS)
        _require_whole("num_elements", self.num_elements, 1, 2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionConfig:
    """DistillKit's settings for one compressed distribution; names and defaults are DistillKit's.

    Raises:
        InvalidInput: a value is out of range, or values contradict each other.
    """

    d: int
    """Size of the vocabulary, which determines the bits of an id."""
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    """Powers of the rank, or "sqrt" or "exp" of it."""
    term_dtype: str = "float32"
    bins: tuple[ResidualBin, ...] = ()
    """Runs of residuals after the `exact_k` entries; DistillKit's key is `residual_bins`."""
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        _require_whole("d", self.d, 2, 2**31)
        _require_whole("k", self.k, 1, self.d)
        _require_whole("exact_k", self.exact_k, 0, self.k)
        _require_dtype("exact_dtype", self.exact_dtype)
        _require_dtype("term_dtype", self.term_dtype)
        for term in self.polynomial_terms:
            if term not in _SPECIAL_TERMS and (isinstance(term, bool) or not isinstance(term, int) or term < 0):
                raise InvalidInput(f"polynomial_terms has {term!r}; each is a power of at least 0, 'sqrt' or 'exp'")
        for name in ("delta_encoding", "error_diffusion", "normalize_t"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be true or false")
        left = self.k - self.exact_k
        if sum(b.num_elements for b in self.bins) > left:
            raise InvalidInput(f"residual_bins have more elements than k - exact_k, which is {left}")
        if left and not self.polynomial_terms and not self.bins:
            raise InvalidInput("exact_k is less than k, but there are no polynomial_terms and no residual_bins")


def preset(k: int, vocab_size: int) -> CompressionConfig:
    """DistillKit's recommended settings for at most 128 entries, but with `normalize_t`.

    Its README leaves `normalize_t` out; the float32 coefficients of the rank's fourth power then cost accuracy.
    """
    k = min(k, 128)
    exact_k = min(k, 16)
    return CompressionConfig(
        d=vocab_size,
        k=k,
        exact_k=exact_k,
        exact_dtype="bfloat16",
        polynomial_terms=(0, 1, 2, 3, 4, "sqrt") if k - exact_k >= 6 else tuple(range(min(k - exact_k, 2))),
        delta_encoding=False,
        normalize_t=True,
    )


def read_config(path: str | Path) -> CompressionConfig:
    """Read a config from a YAML or JSON file: alone, or as `logprob_compressor` of a training config.

    Raises:
        InvalidInput: the file does not exist, or holds no such config.
    """
    try:
        value = yaml.safe_load(read_named(path))
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidInput(f"{str(path)!r} cannot be read as a compression config: {error}") from error
    try:
        return config_from_mapping(value)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error.detail}") from error


def find_config(path: str | Path | None, file: Path) -> CompressionConfig:
    """Read the config at `path`, or when that is None the one beside a Parquet file.

    Raises:
        InvalidInput: there is none, or it cannot be read.
    """
    if path is None:
        path = file.parent / CONFIG_NAME
        if not path.is_file():
            raise InvalidInput(f"there is no {CONFIG_NAME} beside {file}; give --compression-config")
    return read_config(path)


def write_config(config: CompressionConfig, folder: Path) -> None:
    """Write the config beside the files, where DistillKit looks for it.

    Raises:
        InvalidInput: the folder has a different one. StoreError: it cannot be written.
    """
    path = folder / CONFIG_NAME
    with store_errors(str(path)):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if read_config(path) != config:
                raise InvalidInput(f"{path} is another config; export to an empty folder")
            return
        partial = path.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(config_to_mapping(config)), encoding="utf-8")
        partial.replace(path)


def config_to_mapping(config: CompressionConfig) -> dict[str, Any]:
    """Convert a config to a mapping with DistillKit's keys."""
    value = asdict(config)
    value["residual_bins"] = list(value.pop("bins"))
    value["polynomial_terms"] = list(config.polynomial_terms) or None
    return value


def config_from_mapping(value: Any) -> CompressionConfig:
    """Build a config from a mapping with DistillKit's keys.

    Raises:
        InvalidInput: it is no config of DistillKit's present format.
    """
    for key in ("teacher", "logprob_compressor"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping):
        raise InvalidInput("a compression config is a mapping with d, k, exact_k and more")
    if "polynomial_degree" in value or "legacy_logit_compression" in value:
        raise InvalidInput(
            "this is DistillKit's legacy format, which keeps logits without their normaliser: their logprobs are "
            "gone; capture them again"
        )
    known = {"residual_bins" if field.name == "bins" else field.name for field in fields(CompressionConfig)}
    unknown = sorted(set(value) - known)
    missing = [name for name in ("d", "k", "exact_k") if name not in value]
    if unknown or missing:
        raise InvalidInput(
            f"a compression config has no key {unknown[0]!r}" if unknown else f"{missing[0]!r} is missing"
        )
    rest = {name: item for name, item in value.items() if name not in {"residual_bins", "polynomial_terms"}}
    try:
        bins = tuple(ResidualBin(**item) for item in value.get("residual_bins") or ())
    except TypeError as error:
        raise InvalidInput(f"residual_bins cannot be read: {error}") from error
    terms = value.get("polynomial_terms") or ()
    if not isinstance(terms, Sequence) or isinstance(terms, str):
        raise InvalidInput(f"polynomial_terms is {terms!r}; it must be a list")
    return CompressionConfig(**rest, bins=bins, polynomial_terms=tuple(terms))


def _require_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidInput(f"{name} is {value!r}; it must be a whole number from {least} to {most}")


def _require_dtype(name: str, value: object) -> None:
    if value not in _DTYPES:
        raise InvalidInput(f"{name} is {value!r}; it must be one of {', '.join(_DTYPES)}")
