"""Targets as they travel over HTTP: Arrow streams and the JSON form of the same.

The service writes and the clients read them; neither knows of the store.
"""
