"""What the service's TOML file may say: each key with its unit, default and bounds.

Read once at the start and passed down as plain values.
"""
