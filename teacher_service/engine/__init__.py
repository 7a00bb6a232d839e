"""One vLLM engine as a teacher: its options, its identity, its thread."""
