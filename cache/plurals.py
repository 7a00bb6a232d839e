"""Counts in words."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun: `1 shard`, `2,000 shards`, `0 entries` (from `entry`, `entries`)."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
