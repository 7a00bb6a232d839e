"""The files that sources mean: kinds by name, compression, and what a folder holds beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from potstill.cache.corpus.sources.documents import Field
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted

_KINDS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".text"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "tokens",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSIBLE = {"text", "lines", "json"}
# What holds the fields that an option names; text files are text, and files of tokens are tokens.
_FITTING = {
    "text": {"text", "lines", "json", "parquet", "arrow", "tokens"},
    "ids": {"lines", "json", "parquet", "arrow", "tokens"},
    "messages": {"lines", "json", "parquet", "arrow"},
    "completion": {"lines", "json", "parquet", "arrow"},
}
# Written by the `datasets` library beside the data of `save_to_disk`.
_STATE = "state.json"
_OF_DATASETS = {_STATE, "dataset_info.json", "dataset_dict.json"}
FILTER_REPORT = "potstill-filter.json"
"""Name of what `potstill filter` writes beside what it kept."""
_NAMED = 3


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to ingest."""

    path: Path
    name: str
    """Name that the corpus records, never an absolute path."""
    kind: str
    compression: str | None = None


def list_sources(
    sources: Sequence[str | Path], field: Field, *, skip_unknown: bool = False
) -> tuple[list[SourceFile], int]:
    """List the files meant by `sources`, and count those left out; a folder means all below it, in order of name.

    Hidden files, what the `datasets` library keeps beside its data, and a filter's report are no sources, and not
    counted.

    Raises:
        InvalidInput: a source does not exist or is of an unknown kind; a folder holds none of a known kind, or, if
            they are not to be left out, one of an unknown kind.
    """
    files: list[SourceFile] = []
    unknown: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = _in_folder(source)
            known = [file for path in inside if (file := _source_file(path, str(path.relative_to(source)), field))]
            if not known:
                raise InvalidInput(f"folder {str(source)!r} holds no {_endings(field)} file")
            taken = {file.path for file in known}
            unknown += [path for path in inside if path not in taken]
            files += known
        elif source.is_file():
            if (file := _source_file(source, source.name, field)) is None:
                only = " (--skip-unknown holds for files in folders only)" if skip_unknown else ""
                raise InvalidInput(f"{str(source)!r} is not {_endings(field)}; rename or convert it{only}")
            files.append(file)
        else:
            raise InvalidInput(f"source {str(source)!r} does not exist")
    if unknown and not skip_unknown:
        some = ", ".join(map(str, unknown[:_NAMED])) + (", …" if len(unknown) > _NAMED else "")
        raise InvalidInput(
            f"{counted(len(unknown), 'file')} of an unknown kind would be left out: {some}; "
            f"known are {_endings(field)}: convert them, or leave them out with --skip-unknown"
        )
    return files, len(unknown)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes as they lie on disk, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source_file(path: Path, name: str, field: Field) -> SourceFile | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = _KINDS.get("".join(suffixes[-2:-1] if compression else suffixes[-1:]), "")
    if kind not in _FITTING[field.kind] or (compression and kind not in _COMPRESSIBLE):
        return None
    return SourceFile(path, name, kind, compression)


def _endings(field: Field) -> str:
    kinds = _FITTING[field.kind]
    *some, last = [suffix for suffix, kind in _KINDS.items() if kind in kinds]
    packed = " (text and JSON also with .gz or .zst)"
    return f"{', '.join(some)} or {last}{packed}"


def _in_folder(folder: Path) -> list[Path]:
    """The files below a folder that are data, known or not."""
    below = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder)) and path.is_file()]
    found: list[Path] = []
    for parent, group in groupby(below, key=lambda path: path.parent):
        found += _without_beside(parent, list(group))
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _without_beside(folder: Path, files: list[Path]) -> list[Path]:
    """The files of one folder without those that only say something of others."""
    names = {path.name for path in files}
    if "dataset_dict.json" in names or {"dataset_info.json", _STATE} <= names:
        # Beside the data, `datasets` keeps what `map` and `filter` made in Arrow files of other names.
        data = set(_data_files(folder / _STATE)) if _STATE in names else set()
        files = [p for p in files if p.name not in _OF_DATASETS and (p.suffix != ".arrow" or p.name in data)]
    files = [p for p in files if p.name != FILTER_REPORT]
    return [p for p in files if p.suffix != ".idx" or p.with_suffix(".bin").name not in names]


def _data_files(state: Path) -> Iterator[str]:
    """The names of the Arrow files that a data set of `save_to_disk` consists of."""
    try:
        files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        yield from [str(file["filename"]) for file in files]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{state} does not name the data set's files; save it again by save_to_disk") from error
