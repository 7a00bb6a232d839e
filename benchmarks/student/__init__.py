"""Costs of a student in training."""
