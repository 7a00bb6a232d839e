"""Objects under one root: created once, listed, read as checked Zarr groups, and claimed by one worker at a time.

Local folders and object stores alike. It knows nothing of corpora or targets.
"""
