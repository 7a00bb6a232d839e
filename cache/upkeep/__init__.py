"""Upkeep of a cache: inspection, integrity, drift from a live teacher, garbage, deletion, estimates."""
