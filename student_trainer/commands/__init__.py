"""The trainer's `potstill` commands."""
