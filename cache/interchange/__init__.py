"""Export and import of targets: Parquet with list columns, and DistillKit's compressed datasets."""
