"""Attacks on a running service, a file for each kind, and the process that they are tried on.

An attack knows sockets and HTTP only, so that it runs on the code of any revision.
"""
