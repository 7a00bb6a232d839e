"""Sealed sets of rows on one token axis: ingest, tokenizer fingerprints, row look-up by key, annotations.

Nothing here knows of teachers.
"""
