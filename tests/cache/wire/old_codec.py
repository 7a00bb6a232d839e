"""Arrow streams that unpack to far more than their bytes, by the spelling of compression that older writers had."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

OLD_CODEC = b"ARROW:experimental_compression"


def old_codec_stream(batch: Any, codec: str, *, batches: int = 1, version: Any = pa.ipc.MetadataVersion.V4) -> bytes:
    """A stream of a batch, `batches` times, whose buffers are compressed and whose messages alone name the codec."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(metadata_version=version, compression=codec)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch, custom_metadata={OLD_CODEC: codec.encode()})
    body: bytes = sink.getvalue().to_pybytes()
    begin = 8 + struct.unpack_from("<i", body, 4)[0]
    end = len(body) - 8
    return body[:begin] + _without_codec(body[begin:end]) * batches + body[end:]


def _without_codec(message: bytes) -> bytes:
    """Take the codec out of the record batch's own metadata: field 3 of the table that is field 2 of the message."""
    data = bytearray(message)
    table = 8 + struct.unpack_from("<I", data, 8)[0]
    header = table + struct.unpack_from("<H", data, _entry(data, table, 2))[0]
    batch = header + struct.unpack_from("<I", data, header)[0]
    struct.pack_into("<H", data, _entry(data, batch, 3), 0)
    return bytes(data)


def _entry(data: bytearray, table: int, field: int) -> int:
    """Place of a field's offset in the vtable of a table of Flatbuffers."""
    return table - int(struct.unpack_from("<i", data, table)[0]) + 4 + 2 * field
