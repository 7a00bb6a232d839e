"""Texts before and behind a corpus: what is measured of them, which are left out, and what benchmarks stand in them.

`filtering` goes through documents and keeps those that the `rules` leave; `contamination` goes through the text of a
corpus's rows and finds items of benchmarks.
"""

from __future__ import annotations
