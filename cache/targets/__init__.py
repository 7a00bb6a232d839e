"""Teachers' targets of a corpus: segments, the commits that publish them, rank tables, and reading by position or row.

Built on `corpus`, `encoding` and `store`.
"""
