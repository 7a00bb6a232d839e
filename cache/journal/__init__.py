"""Rows that were asked for over HTTP and belong to no corpus: kept, looked up, joined, evicted, made a corpus of."""
