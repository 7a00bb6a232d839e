"""Teachers with other tokenizers."""
