"""Real tokenizers without models, as `tokenizers` takes them."""
