"""Admission: bounds of one request and of all together, and the queue in front of each engine, fair between keys."""
