"""URLs and API keys of services, as people type them."""

from __future__ import annotations

import os
import re

import httpx

from potstill.cache.errors import InvalidInput
from potstill.cache.logins import without_login

API_KEY_VARIABLE = "POTSTILL_API_KEY"
"""Holds the API key for every service that is called without one, so that no command line shows it."""


def key_in(variable: str | None, named_by: str) -> str | None:
    """Read the API key from the environment variable that the option or setting `named_by` names.

    Returns None when `variable` is None.

    Raises:
        InvalidInput: the variable is not set, or empty.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise InvalidInput(f"{named_by} {variable}: there is no such environment variable, or it is empty")
    return key


def key_header(api_key: str | None) -> dict[str, str]:
    """The HTTP header that shows `api_key`, by default that of `POTSTILL_API_KEY`; empty without a key, or for "".

    Raises:
        InvalidInput: the key has characters that no header can hold.
    """
    found = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    if not found:
        return {}
    key = found.strip()  # as a file or a shell may have put a line end behind it
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidInput("the API key has characters that no key has; give it as `potstill keys add` printed it")
    return {"authorization": f"Bearer {key}"}


def login_of(url: str) -> tuple[str, str] | None:
    """The user and password in a URL; None when it has none.

    Raises:
        InvalidInput: not a URL.
    """
    parsed = _parsed(url)
    return (parsed.username, parsed.password) if parsed.userinfo else None


def checked_url(url: str) -> str:
    """The URL without a trailing slash, and without user and password, so that messages may show it.

    Raises:
        InvalidInput: no http or https scheme, no host, a bad port, or a query or fragment.
    """
    parsed = _parsed(url)
    if re.search(r"\s", url):
        raise InvalidInput("the URL of the service has a space in it; write http://host:port, with %20 for a space")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise InvalidInput(f"{url!r} has port {parsed.port}; a port is a number from 1 to 65535")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise InvalidInput(f"{url!r} is not the URL of a service; write http://host:port")
    return without_login(str(parsed)).rstrip("/")


def _parsed(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        why = "" if "@" in str(url) else f": {error}"  # which may quote a part of a password
        raise InvalidInput(f"{str(url)!r} is not a URL{why}; write http://host:port") from error
