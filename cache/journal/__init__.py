"""The journal: rows that were scored over HTTP and belong to no corpus; stored, found again, joined, evicted.

`compact` makes a corpus of them.
"""
