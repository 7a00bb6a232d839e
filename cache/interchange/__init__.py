"""Targets in other people's files: Parquet with list columns, and DistillKit's compressed datasets, out and in."""
