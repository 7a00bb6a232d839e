"""Targets over HTTP: Arrow streams, and the same as JSON.

The service writes them and the clients read them; nothing here knows of the store.
"""

from __future__ import annotations

from potstill.cache.wire.stream import StreamHead, StreamReader, write_targets

__all__ = ["StreamHead", "StreamReader", "write_targets"]
