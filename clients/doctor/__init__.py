"""Checks of a service, its teachers and a cache before hours of work rest on them; `potstill doctor` runs them."""
