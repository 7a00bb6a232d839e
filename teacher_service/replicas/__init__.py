"""Replicas: the engines of one teacher, started, watched, replaced and scaled, in this process or on Ray Serve."""
