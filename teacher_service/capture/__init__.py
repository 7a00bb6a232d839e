"""Capture: the ways from the engine's logits to targets, and the self-check of private ways against the public one."""
