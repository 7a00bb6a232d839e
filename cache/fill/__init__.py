"""Filling a target set from a teacher: which shards are left, who scores which, and the writing beside the scoring.

Stopped at any moment, it goes on from what is committed.
"""
