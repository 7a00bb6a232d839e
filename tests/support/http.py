"""Calls of httpx that wait as long as a busy machine may take: its own five seconds fit an idle one."""

from __future__ import annotations

from functools import partial

import httpx

SECONDS = 120.0

TRUSTED = httpx.create_ssl_context()
"""Made once: reading the certificates takes longer than most of our calls."""

request = partial(httpx.request, timeout=SECONDS, verify=TRUSTED)
head = partial(httpx.head, timeout=SECONDS, verify=TRUSTED)
get = partial(httpx.get, timeout=SECONDS, verify=TRUSTED)
post = partial(httpx.post, timeout=SECONDS, verify=TRUSTED)
put = partial(httpx.put, timeout=SECONDS, verify=TRUSTED)
patch = partial(httpx.patch, timeout=SECONDS, verify=TRUSTED)
delete = partial(httpx.delete, timeout=SECONDS, verify=TRUSTED)
stream = partial(httpx.stream, timeout=SECONDS, verify=TRUSTED)
