"""Measures of a student on rows that it never saw, and the results of a run."""
