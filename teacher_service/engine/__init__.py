"""The vLLM teacher: its options and identity, the thread that steps the engine, and the engine itself."""
