"""Sealed sets of rows on one token axis: ingest, tokenizer fingerprints, row look-up by key, annotations.

Nothing here knows of teachers.
"""

from __future__ import annotations

from potstill.cache.corpus.annotations import annotate
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan
from potstill.cache.corpus.keys import KeyIndex
from potstill.cache.corpus.seal import Source

__all__ = ["Corpus", "IngestPlan", "KeyIndex", "Source", "annotate"]
