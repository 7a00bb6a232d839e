from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.cache.errors import InvalidInput
from potstill.cache.store.claims import Claims, Owner
from potstill.cache.store.root import Root
from tests.support.paths import ROOT

PATH = "targets/t/c/claims"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(root: Root, clock: Clock, *, ttl: float = 60.0, elsewhere: bool = True) -> Claims:
    """A job whose process cannot be looked at, as on another machine."""
    claims = Claims(root, PATH, ttl=ttl, clock=clock)
    if elsewhere:
        claims.owner = replace(claims.owner, host="elsewhere", place="")
    return claims


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root.open("memory://" if request.param == "memory" else tmp_path)


def files(root: Root) -> list[str]:
    return root.objects(PATH)


def test_one_of_two_jobs_gets_a_name_and_the_other_sees_it_busy_until_it_is_released(root: Root) -> None:
    clock = Clock()
    first, second = job(root, clock), job(root, clock)
    assert first.busy() == second.busy() == set()
    claim = first.take("000003")
    assert claim is not None
    assert second.take("000003") is None
    assert second.busy() == {"000003"}
    assert first.busy() == set(), "one's own claims are not others'"
    assert claim.still_mine()
    claim.release()
    assert files(root) == []
    assert second.busy() == set()
    assert second.take("000003") is not None


def test_a_renewed_claim_holds_however_long_and_leaves_one_object(root: Root) -> None:
    clock = Clock()
    owner, other = job(root, clock), job(root, clock)
    claim = owner.take("000000")
    assert claim is not None
    for _ in range(5):
        assert other.busy() == {"000000"}
        clock.now += 40
        owner.renew()
        assert len(files(root)) == 1
    assert other.busy() == {"000000"}
    assert claim.still_mine()
    assert claim.generation == 6


def test_a_claim_seen_unchanged_for_its_time_to_live_is_taken_over_and_its_owner_learns_it(root: Root) -> None:
    clock = Clock()
    stalled, other = job(root, clock, ttl=60), job(root, clock, ttl=5)
    claim = stalled.take("000000")
    assert claim is not None
    clock.now += 1000
    assert other.busy() == {"000000"}, "this job has not watched it for any time yet"
    clock.now += 59
    assert other.busy() == {"000000"}, "the owner's time to live counts, not the watcher's"
    clock.now += 2
    assert other.busy() == set()
    taken = other.take("000000")
    assert taken is not None
    assert len(files(root)) == 1
    assert taken.still_mine()
    stalled.renew()
    assert claim.lost
    assert not claim.still_mine()
    claim.release()
    assert taken.still_mine()
    assert len(files(root)) == 1


def test_who_lost_a_claim_does_not_take_it_back_while_its_new_owner_is_alive(root: Root) -> None:
    clock = Clock()
    stalled, other = job(root, clock), job(root, clock)
    claim = stalled.take("000000")
    assert claim is not None
    other.busy()
    clock.now += 61
    assert other.busy() == set()
    taken = other.take("000000")
    assert taken is not None
    stalled.renew()
    assert claim.lost
    assert stalled.busy() == {"000000"}
    assert stalled.take("000000") is None
    assert taken.still_mine()
    clock.now += 61
    assert stalled.busy() == set(), "unless that one falls silent too"
    assert stalled.take("000000") is not None


def test_who_wakes_after_the_next_owner_released_may_go_on_but_not_after_a_third_job_claimed(root: Root) -> None:
    clock = Clock()
    stalled, second, third = (job(root, clock) for _ in range(3))
    claim = stalled.take("000000")
    assert claim is not None
    second.busy()
    clock.now += 61
    assert second.busy() == set()
    taken = second.take("000000")
    assert taken is not None
    taken.release()
    assert files(root) == []
    assert claim.still_mine(), "nobody works on it: what was scored may still be committed, if absent"
    third.busy()
    again = third.take("000000")
    assert again is not None
    assert again.generation == claim.generation, "a generation's name is used again"
    assert not claim.still_mine()
    claim.release()
    assert again.still_mine()


def test_a_listing_older_than_the_owners_renewals_does_not_win(root: Root) -> None:
    clock = Clock()
    owner, other = job(root, clock), job(root, clock)
    other.busy()
    claim = owner.take("000000")
    assert claim is not None
    for _ in range(3):
        owner.renew()
    assert other.take("000000") is None, "generation 1 was free again, but 4 is the newest"
    assert claim.still_mine()
    assert len(files(root)) == 1


def test_what_a_crash_between_two_generations_left_goes_with_the_take_over(root: Root) -> None:
    clock = Clock()
    owner, other = job(root, clock), job(root, clock)
    assert owner.take("000000") is not None
    left = files(root)[0]
    data = root.get(f"{PATH}/{left}")
    owner.renew()
    assert data is not None
    root.create(f"{PATH}/{left}", data)
    assert len(files(root)) == 2
    other.busy()
    clock.now += 61
    other.busy()
    assert other.take("000000") is not None
    assert files(root) == ["000000-0003.json"]


def test_threads_that_race_for_many_names_share_them_out(root: Root) -> None:
    jobs = [job(root, Clock()) for _ in range(4)]
    names = [f"{shard:06d}" for shard in range(25)]
    won: list[list[str]] = [[] for _ in jobs]

    def race(index: int) -> None:
        jobs[index].busy()
        won[index] = [name for name in names if jobs[index].take(name) is not None]

    threads = [threading.Thread(target=race, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for each in won for name in each) == names


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"ttl": "x"}', b'{"ttl": 1e400}', b"\xff"])
def test_a_claim_nobody_can_read_expires_like_any_other(root: Root, data: bytes) -> None:
    clock = Clock()
    root.create(f"{PATH}/000000-0001.json", data)
    root.create(f"{PATH}/README", b"not a claim")
    claims = job(root, clock, ttl=60)
    assert claims.busy() == {"000000"}
    clock.now += 61
    assert claims.busy() == set()
    assert claims.take("000000") is not None


def test_a_context_renews_by_itself_and_releases_at_its_end(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    with Claims(root, PATH, ttl=0.15) as claims:
        claim = claims.take("000000")
        assert claim is not None
        deadline = time.monotonic() + 300
        while claim.generation < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert claim.still_mine()
    assert files(root) == []


def test_clear_removes_what_silent_jobs_left_and_no_live_claim(root: Root) -> None:
    clock = Clock()
    silent, live, cleaner = job(root, clock), job(root, clock), job(root, clock)
    silent.take("000000")
    live.take("000001")
    cleaner.take("000002")
    cleaner.busy()
    clock.now += 61
    live.renew()
    cleaner.clear()
    assert files(root) == ["000001-0002.json", "000002-0001.json"]


def test_a_process_is_dead_only_to_who_can_see_it() -> None:
    me = Owner.this_process()
    assert not me.is_dead(me.place)
    gone = replace(me, pid=2**22 + 1)
    assert gone.is_dead(me.place)
    assert replace(me, started="1").is_dead(me.place), "its pid was used again"
    assert not gone.is_dead("another boot or container")
    assert not gone.is_dead("")


@pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan")])
def test_a_time_to_live_that_never_or_always_expires_is_refused(tmp_path: Path, ttl: float) -> None:
    with pytest.raises(InvalidInput, match="--claim-seconds"):
        Claims(Root.open(tmp_path), PATH, ttl=ttl)


HOLDER = """
import sys
from potstill.cache.store.claims import Claims
from potstill.cache.store.root import Root
with Claims(Root.open(sys.argv[1]), sys.argv[2], ttl=float(sys.argv[3])) as claims:
    claim = claims.take("000000")
    print("held", flush=True)
    sys.stdin.readline()
    print(claim.still_mine(), flush=True)
"""


@contextmanager
def holder(folder: Path, ttl: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder), PATH, str(ttl)]
    cwd = ROOT
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    claims = Claims(root, PATH, ttl=1000)
    with holder(tmp_path, 1000) as process:
        assert claims.busy() == {"000000"}
        process.send_signal(signal.SIGKILL)
        # Not waited for yet: a process that only waits to be reaped is dead too.
        while claims.busy():
            time.sleep(0.01)
        assert claims.take("000000") is not None
    assert json.loads(root.get(f"{PATH}/000000-0002.json") or b"")["job"] == claims.owner.job


def test_a_stopped_process_keeps_its_claim_for_its_time_and_finds_it_lost_when_it_wakes(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    claims = Claims(root, PATH, ttl=1000)
    with holder(tmp_path, 0.6) as process:
        process.send_signal(signal.SIGSTOP)
        assert claims.busy() == {"000000"}
        while claims.busy():
            time.sleep(0.02)
        claim = claims.take("000000")
        assert claim is not None
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("\n")
        assert out == "False\n"
    assert claim.still_mine()
    assert files(root) == ["000000-" + f"{claim.generation:04d}.json"]
