"""Calls of httpx that wait as long as a busy machine may take: its own five seconds fit an idle one."""

from __future__ import annotations

from functools import partial

import httpx

SECONDS = 120.0

request = partial(httpx.request, timeout=SECONDS)
head = partial(httpx.head, timeout=SECONDS)
get = partial(httpx.get, timeout=SECONDS)
post = partial(httpx.post, timeout=SECONDS)
put = partial(httpx.put, timeout=SECONDS)
patch = partial(httpx.patch, timeout=SECONDS)
delete = partial(httpx.delete, timeout=SECONDS)
stream = partial(httpx.stream, timeout=SECONDS)
