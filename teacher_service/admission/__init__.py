"""Whose rows reach an engine when: bounds of one request and of all together, and a queue that is fair between keys."""
