"""Texts on which a search for logins and keys may take long: in admin actions, scores, names and paths."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx

from benchmarks.abuse.attack import TEACHER, Attack, Door, trusting

_SLASHES = "/" * 70_000
_SETTINGS_BYTES = 7 * 2**20


def odd_texts(door: Door) -> None:
    """Send texts that look like the begin of logins and keys, with a trainer's key."""
    bodies = [
        ("PUT", "/v1/teachers/x", {"model": "?key" * 1000}),
        ("POST", f"/v1/teachers/{TEACHER}/score", {"rows": [[_SLASHES]]}),
        ("POST", f"/v1/teachers/{TEACHER}/score", {"rows": [["=a:" * 500_000]]}),
        *(
            ("POST", f"/v1/teachers/{TEACHER}/score", {"rows": [[place * 500_000]]})
            for place in ("'a:b", "// ", " a:b@")
        ),
        ("POST", "/v1/completions", {"prompt": [[_SLASHES]]}),
    ]
    with httpx.Client(base_url=door.url, headers=door.trainer, timeout=20, verify=trusting()) as client:
        for method, path, body in bodies:
            _send(client, method, path, json.dumps(body).encode())
        _send(client, "GET", "/v1/corpora/" + "%2F" * 15_000, b"")


def wrong_settings(door: Door) -> None:
    """Send 7 MiB of settings, each of them unknown."""
    body = b'{"model": "m"%s}' % b"".join(_unknown())
    with httpx.Client(base_url=door.url, headers=door.trainer, timeout=20, verify=trusting()) as client:
        _send(client, "PUT", "/v1/teachers/x", body)


def _unknown() -> Iterator[bytes]:
    return (b',"%07x":1' % number for number in range(_SETTINGS_BYTES // 12))


def _send(client: httpx.Client, method: str, path: str, body: bytes) -> None:
    try:
        reply = client.request(method, path, content=body, headers={"content-type": "application/json"})
    except httpx.HTTPError:
        return
    assert not reply.is_success, reply.text[:200]


ATTACKS = (
    Attack(1, "texts like the begin of logins", odd_texts),
    Attack(1, "7 MiB of unknown settings", wrong_settings, keys=False),
)
