"""Requests that a web page of another site has a browser send to a service without keys."""

from __future__ import annotations

import httpx

from benchmarks.abuse.attack import CORPUS, TEACHER, Attack, Door, trusting


def other_sites(door: Door) -> None:
    """Start a fill and delete the teacher under another host's name, and from another origin."""
    rebound = {"Host": f"evil.example:{door.port}", "Origin": f"http://evil.example:{door.port}"}
    foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    statuses = []
    with httpx.Client(base_url=door.url, timeout=20, verify=trusting()) as client:
        for headers in (rebound, foreign):
            for method, path in (
                ("PUT", f"/v1/corpora/{CORPUS}/fill/{TEACHER}"),
                ("DELETE", f"/v1/teachers/{TEACHER}"),
            ):
                statuses.append(client.request(method, path, headers=headers, content=b"{}").status_code)
    print(f"answers to other sites: {statuses}", flush=True)


ATTACKS = (Attack(10, "other sites' pages", other_sites, keys=False),)
