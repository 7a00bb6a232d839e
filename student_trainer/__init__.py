"""Students that learn from cached or served teacher targets: data, losses, the loop, and the loop on Ray Train.

Importing this package imports nothing: torch, transformers and Ray come in with the modules that need them.
"""
