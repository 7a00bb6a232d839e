"""Objects under one root, in a local folder or an object store: created once, listed, read as checked Zarr groups.

Claims share work between jobs. Nothing here knows of corpora or targets.
"""

from __future__ import annotations

from potstill.cache.store.claims import Claims
from potstill.cache.store.groups import GroupReader, GroupWriter, Reading
from potstill.cache.store.root import Root, StoredObject

__all__ = ["Claims", "GroupReader", "GroupWriter", "Reading", "Root", "StoredObject"]
