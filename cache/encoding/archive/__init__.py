"""The `archive` encoding: blocks of positions, packed by a range coder under models that learn while they code.

Compiled by numba, and imported only when an archive is read or written.
"""
