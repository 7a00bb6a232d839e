"""Teachers' targets for a corpus: segments, the commits that publish them, rank tables, reads by position or row.

Built on `corpus`, `encoding` and `store`.
"""
