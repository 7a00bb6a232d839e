"""Corpora and committed targets over HTTP, as Arrow streams or JSON."""
