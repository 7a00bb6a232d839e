"""Bytes of files that may be compressed, read as they come, so that memory does not grow with what they unpack to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyarrow as pa

from potstill.cache.corpus.sources.files import SourceFile
from potstill.cache.errors import InvalidInput

_BUFFER_BYTES = 1 << 18
MOST_RECORD_BYTES = 1 << 28
"""Most bytes of one JSON record: read whole, it needs several times as much memory."""


@contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """Open for reading, decompressed.

    Raises:
        InvalidInput: inside the block, where it is not what its name says, or is cut short.
    """
    if file.compression is None:
        with file.path.open("rb") as plain:
            yield plain
        return
    try:
        with (
            pa.input_stream(str(file.path), compression=file.compression) as stream,
            io.BufferedReader(cast("io.RawIOBase", stream), _BUFFER_BYTES) as unpacked,
        ):
            yield cast("BinaryIO", unpacked)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(f"{file.path} cannot be read as {file.compression}: {error}") from error
