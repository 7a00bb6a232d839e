"""The `archive` encoding: ids and logprobs of blocks of positions, packed by a range coder under models that learn.

Compiled by numba, and imported only when an archive is read or written.
"""
