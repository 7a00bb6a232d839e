"""Targets to stored arrays and back: top-k logprobs, the fields beside them, and the error that is measured on the way.

Pure functions of arrays; `archive` is the encoding for cold storage.
"""
