"""Objects under one root, in a local folder or an object store: created once, listed, read as checked Zarr groups.

Claims share work between jobs. Nothing here knows of corpora or targets.
"""
