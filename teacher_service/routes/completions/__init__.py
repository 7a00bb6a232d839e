"""`/v1/completions` and its neighbours, in the shape of vLLM's own server."""
