"""Sealed sets of rows on one token axis: ingest, tokenizer fingerprints, row look-up by key, annotations.

It knows nothing of teachers.
"""
