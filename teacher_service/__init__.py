"""The HTTP service: teachers behind one API, with the cache in front of them.

Importing this package is fast: FastAPI, vLLM and Ray are imported by the modules that need them.
"""
