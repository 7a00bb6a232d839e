"""The client's `potstill` commands."""
