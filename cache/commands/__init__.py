"""Commands that need only a cache, and for some a teacher; each module has SUMMARY, add_arguments and run.

Imports that take long stand inside functions, so that `potstill --help` is quick.
"""
