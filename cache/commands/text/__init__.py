"""Commands about the text of corpora: what is kept of it, what of benchmarks is in it, and what was recorded."""

from __future__ import annotations
