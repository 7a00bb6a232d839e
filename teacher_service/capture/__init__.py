"""Targets computed inside the engine's worker, where the logits are, and the self-check against vLLM's public path."""
