"""Refusals of what a web page of another site has a browser send: it may reach a service that listens on loopback.

A page gets at the service under its own name, whose address it changes (DNS rebinding), or by the service's address.
The first shows in `Host`, the second in `Sec-Fetch-Site` and `Origin`. Other programs choose what they send, and send
none of the last two.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers

from potstill.cache.errors import Forbidden


def require_host(headers: Headers, hosts: Collection[str]) -> None:
    """Refuse a `Host` other than these names, `localhost` and loopback addresses.

    Raises:
        Forbidden: it is another one.
    """
    host = headers.get("host", "").lower()
    name, _, behind = host.removeprefix("[").partition("]" if host.startswith("[") else ":")
    if host.startswith("[") and behind and not behind.startswith(":"):
        name = host
    if name not in hosts and name != "localhost" and not is_loopback(name):
        raise Forbidden(f"the host {name[:80]!r} is not one of this service's names; add it to hosts of [access]")


def require_same_site(headers: Headers) -> None:
    """Refuse what a browser sends for a page of another origin.

    Raises:
        Forbidden: `Sec-Fetch-Site`, or `Origin` where that is not given, names another.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        own = site in ("same-origin", "none")  # of the browser's own accord, as a typed address
    else:
        own = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
    if not own:
        raise Forbidden(f"a page of {(origin or site or '')[:80]!r} may not use this service; open the service's own")


def is_loopback(name: str) -> bool:
    """True for a loopback address; False for any other, and for a name."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
