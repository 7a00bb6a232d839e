"""A teacher with the cache in front of it: known rows are answered from the cache, others scored once and kept."""
