"""The seal of a corpus: the record that is created last, if absent, and makes the corpus exist."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from potstill.cache.errors import FormatError, StoreError, UnknownCorpus
from potstill.cache.store import Root, StoredObject
from potstill.cache.store.groups import objects_from_json
from potstill.cache.store.publishing import publish
from potstill.cache.store.record import group_metadata, read_group_metadata, values_read
from potstill.cache.store.root import check_name, is_name

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file that was ingested."""

    name: str
    sha256: str
    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpec:
    """Content of the seal of a corpus."""

    data: str
    """Name of the child group that holds the arrays."""
    fingerprint: str
    """sha256 of the content: tokenizer, tokens, rows, shards, and documents and loss mask where there are."""
    tokenizer_sha256: str
    vocab_size: int
    num_rows: int
    num_positions: int
    num_shards: int
    longest_row: int
    max_token_id: int
    row_tokens: int
    duplicate_rows: int
    """Number of rows that are equal to an earlier row."""
    sources: tuple[Source, ...]
    objects: tuple[StoredObject, ...]
    num_documents: int | None = None
    """Number of documents with rows; None where nobody said which row is of which."""
    num_taught: int | None = None
    """Number of targets that are to be learnt; None for all, where there is no loss mask."""


def corpus_path(name: str) -> str:
    """Path of a corpus below the root."""
    return f"corpora/{check_name('corpus', name)}"


def list_corpora(root: Root) -> list[str]:
    """Names of the sealed corpora, sorted."""
    return [name for name in root.folders("corpora") if root.get(f"corpora/{name}/zarr.json") is not None]


def seal_corpus(root: Root, name: str, spec: CorpusSpec) -> bool:
    """Create the seal, which makes the corpus exist; False when another was sealed under the name meanwhile."""
    record = {name: getattr(spec, name) for name in CorpusSpec.__dataclass_fields__}
    path = corpus_path(name)
    return publish(root, f"{path}/zarr.json", group_metadata("corpus", record), f"{path}/{spec.data}", spec.objects)


def read_seal(root: Root, name: str) -> CorpusSpec:
    """Read and check the seal of a corpus.

    Raises:
        UnknownCorpus: no corpus is sealed under that name. FormatError: this version cannot read the seal.
    """
    path = corpus_path(name)
    seal = read_group_metadata(root, path, "corpus")
    if seal is None:
        raise UnknownCorpus(f"no corpus {name!r} in {root.url}; there are: {_known(root)}")
    with values_read(f"{path}/zarr.json is not the seal of a corpus"):
        sources = tuple(Source(**source) for source in seal["sources"])
        # Before format 3 there were no counts of documents and of what is taught.
        later = set() if seal["format"] >= 3 else {"num_documents", "num_taught"}
        names = set(CorpusSpec.__dataclass_fields__) - {"sources", "objects"} - later
        objects = objects_from_json(seal["objects"])
        spec = CorpusSpec(**{key: seal[key] for key in names}, sources=sources, objects=objects)
    check_spec(spec, f"{path}/zarr.json")
    if not isinstance(spec.data, str) or not is_name(spec.data):
        raise FormatError(f"{path}/zarr.json has impossible names: {json.dumps(spec.data)}")
    return spec


def _known(root: Root) -> str:
    try:
        return ", ".join(list_corpora(root)) or "none"
    except StoreError as error:  # the caller reports an unknown corpus; a listing that fails must not hide that
        return f"some that cannot be listed ({error.detail})"


def check_spec(spec: CorpusSpec, where: str) -> None:
    """Refuse counts and names that no corpus has.

    Raises:
        FormatError: it has some.
    """
    counts = (spec.num_shards, spec.num_rows, spec.num_positions, spec.longest_row, spec.vocab_size)
    if not all(type(n) is int and 0 < n < 2**62 for n in counts):
        raise FormatError(f"{where} has impossible counts: {json.dumps(counts)}")
    if not (spec.num_shards <= spec.num_rows <= spec.num_positions and spec.longest_row <= spec.num_positions):
        raise FormatError(f"{where} has impossible counts: {json.dumps(counts)}")
    names = (spec.fingerprint, spec.tokenizer_sha256)
    if not all(isinstance(name, str) for name in names):
        raise FormatError(f"{where} has impossible names: {json.dumps(names)}")
    if not _SHA256.fullmatch(spec.tokenizer_sha256):
        raise FormatError(f"{where} has the tokenizer_sha256 {spec.tokenizer_sha256[:80]!r}, which is no sha256")
    for name in ("max_token_id", "row_tokens"):
        if type(getattr(spec, name)) is not int:
            raise FormatError(f"{where} has impossible counts: {name} {getattr(spec, name)!r}")
    for name, most in (("num_documents", spec.num_rows), ("num_taught", spec.num_positions - 1)):
        count = getattr(spec, name)
        if count is not None and not (type(count) is int and 0 < count <= most):
            raise FormatError(f"{where} has impossible counts: {name} {count!r}")
