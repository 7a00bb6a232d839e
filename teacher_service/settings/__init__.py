"""The service's settings: each key of the TOML file with its unit, default and bounds.

They are read once at the start and passed down as plain values.
"""
