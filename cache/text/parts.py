"""Files of records that a filter kept: JSON lines, in parts of some size."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from potstill.cache.corpus.seal import Source
from potstill.cache.corpus.sources import file_sha256
from potstill.cache.errors import InvalidInput
from potstill.cache.store.root import store_errors

PART_BYTES = 1 << 28
_AS_TEXT = (dt.date, dt.time, dt.timedelta, decimal.Decimal)


class Parts:
    """Writes records to `part-00000.jsonl` and so on. Closing it ends the last part."""

    def __init__(self, folder: Path, part_bytes: int = PART_BYTES) -> None:
        self.sources: list[Source] = []
        """The parts that are whole, as an ingest will record them."""
        self._folder = folder
        self._part_bytes = part_bytes
        self._file: BinaryIO | None = None
        self._records = self._bytes = 0

    def write(self, record: Mapping[str, Any], where: str) -> None:
        """Write one record.

        Raises:
            InvalidInput: it has a value that JSON does not have; `where` names it. StoreError: the disk is full.
        """
        try:
            line = json.dumps(record, ensure_ascii=False, default=_as_text).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{where} has a field that JSON cannot hold: {error}; take it out first") from error
        if self._file is not None and self._bytes + len(line) > self._part_bytes:
            self.close()
        with store_errors(f"what is kept, in {self._folder}"):
            if self._file is None:
                self._file = (self._folder / f"part-{len(self.sources):05}.jsonl").open("wb")
            self._file.write(line)
        self._records += 1
        self._bytes += len(line)

    def close(self) -> None:
        """End the part that is written."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with store_errors(f"what is kept, in {self._folder}"):
            file.close()
        path = Path(file.name)
        self.sources.append(Source(name=path.name, sha256=file_sha256(path), documents=self._records))
        self._records = self._bytes = 0


def _as_text(value: Any) -> str:
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(type(value).__name__)
