"""Targets over HTTP: Arrow streams, and the same as JSON.

The service writes them and the clients read them; nothing here knows of the store.
"""
