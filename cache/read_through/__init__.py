"""A teacher with the cache in front: known rows are answered from it, missed ones are scored once and kept."""
