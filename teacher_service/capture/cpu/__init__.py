"""Capture on CPUs: compiled sweeps of each row of logits, and the threads, cores and memory that they need."""
