"""Listings of many corpora, again and again."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from pathlib import Path

import httpx

from benchmarks.abuse.attack import CORPUS, Attack, Door, trusting

CORPORA = 300
CONNECTIONS = 40
_SECONDS = 20.0


def many_corpora(root: Path) -> None:
    """Copy the corpus under further names."""
    for number in range(CORPORA):
        shutil.copytree(root / "corpora" / CORPUS, root / "corpora" / f"copy-{number}")


def list_corpora(door: Door) -> None:
    """List the corpora on 40 connections with one key, while another key reads a few tokens."""
    end = time.monotonic() + _SECONDS
    threads = [threading.Thread(target=_list, args=(door, end)) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    longest = _read_tokens(door, end)
    for thread in threads:
        thread.join()
    print(f"a small read of another key took at most {longest:.2f} s", flush=True)


def _read_tokens(door: Door, end: float) -> float:
    longest = 0.0
    other = {"Authorization": f"Bearer {door.batch_key}"}
    with httpx.Client(base_url=door.url, headers=other, timeout=120, verify=trusting()) as client:
        while time.monotonic() < end:
            begin = time.monotonic()
            client.get(f"/v1/corpora/{CORPUS}/tokens", params={"start": 0, "stop": 8}).raise_for_status()
            longest = max(longest, time.monotonic() - begin)
    return longest


def _list(door: Door, end: float) -> None:
    with httpx.Client(base_url=door.url, headers=door.trainer, timeout=120, verify=trusting()) as client:
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                client.get("/v1/corpora")


ATTACKS = (Attack(9, "301 corpora listed on 40 connections", list_corpora, prepare=many_corpora),)
