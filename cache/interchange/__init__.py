"""Export and import of targets: Parquet with list columns, and DistillKit's compressed datasets."""

from __future__ import annotations

from potstill.cache.interchange.formats import RowFormat, export_shards
from potstill.cache.interchange.importing import ImportPlan, ImportReport, import_targets

__all__ = ["ImportPlan", "ImportReport", "RowFormat", "export_shards", "import_targets"]
