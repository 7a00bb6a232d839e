"""Keys that share a few threads, and the listing of corpora that many callers share."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from potstill.cache.errors import Overloaded, StoreError
from potstill.teacher_service.access.auth import Caller, Role, caller
from potstill.teacher_service.routes.corpora.listing import Listing
from potstill.teacher_service.transport.turns import FairThreads
from tests.support.waiting import eventually


class Gate:
    """Blocking calls that end when they are let, one by one, and the order in which they began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._let = threading.Semaphore(0)

    def call(self, name: str) -> None:
        self.begun.append(name)
        assert self._let.acquire(timeout=300)

    def let(self, number: int = 1) -> None:
        self._let.release(number)


def asking(threads: FairThreads, gate: Gate, key: str) -> asyncio.Task[None]:
    async def ask() -> None:
        caller.set(Caller(key, Role.TRAINER))
        threads.require_room()
        await threads.run(lambda: gate.call(key))

    return asyncio.create_task(ask())


async def test_a_key_with_few_calls_does_not_wait_behind_all_of_another() -> None:
    threads, gate = FairThreads(1, "test"), Gate()
    calls = [asking(threads, gate, "greedy") for _ in range(20)]
    await eventually(lambda: bool(gate.begun))
    calls += [asking(threads, gate, name) for name in ("ann", "bob", "ann")]
    await asyncio.sleep(0)
    gate.let(23)
    await asyncio.gather(*calls)
    assert gate.begun[:7] == ["greedy", "greedy", "ann", "bob", "greedy", "ann", "greedy"]


async def test_callers_that_leave_free_no_thread_that_is_busy() -> None:
    threads, gate = FairThreads(1, "test"), Gate()
    calls = [asking(threads, gate, "a") for _ in range(5)]
    await eventually(lambda: bool(gate.begun))
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    last = asking(threads, gate, "b")
    await asyncio.sleep(0)
    assert gate.begun == ["a"]
    gate.let(2)
    await last
    assert gate.begun == ["a", "b"]


async def test_calls_of_a_key_that_wait_are_bounded() -> None:
    threads, gate = FairThreads(1, "test"), Gate()
    calls = [asking(threads, gate, "a") for _ in range(258)]
    other = asking(threads, gate, "b")
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    gate.let(300)
    found = await asyncio.gather(*calls, other, return_exceptions=True)
    assert [type(each) for each in found if each is not None] == [Overloaded]


class Counted:
    """A listing that fails at first, and the number of times that it was made."""

    def __init__(self) -> None:
        self.made = 0

    def make(self) -> dict[str, Any]:
        self.made += 1
        if self.made == 1:
            raise StoreError("away")
        threading.Event().wait(0.05)
        return {"corpora": self.made}


async def test_callers_share_a_listing_for_longer_than_it_takes_and_no_failure() -> None:
    counted = Counted()
    listing = Listing(FairThreads(4, "test"), counted.make)
    with pytest.raises(StoreError):
        await listing.latest()
    first, *others = [asyncio.create_task(listing.latest()) for _ in range(20)]
    await asyncio.sleep(0)
    first.cancel()
    assert set(await asyncio.gather(*others)) == {b'{"corpora":2}'}
    assert await listing.latest() == b'{"corpora":2}'
    assert counted.made == 2
