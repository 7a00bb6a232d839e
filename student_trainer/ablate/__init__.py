"""Ablations: runs that differ in one choice, trained and judged alike, and what the choice is worth."""
