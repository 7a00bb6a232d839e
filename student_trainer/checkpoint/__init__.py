"""Checkpoints of a run, whole or not there, and the model that it publishes at its end.

`checkpoints` writes and reads both kinds: `whole` is one file of each thing, `sharded` a file of each worker.
"""
