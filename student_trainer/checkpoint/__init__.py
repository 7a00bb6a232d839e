"""Checkpoints of a run, whole or not there, and the model that it publishes at its end."""
