"""The look for targets of renamed models: nobody waits for it, and what cannot be looked at is named."""

from __future__ import annotations

import asyncio
import os
import re
import select
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from potstill.cache import Cache
from potstill.clients.doctor.service_checks import check_service
from potstill.teacher_service.hosting.renamed_look import RenamedLook, look_for_renamed
from tests.support import http
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import commit
from tests.support.processes.serve_process import COMMAND, environment
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.waiting import eventually, until


class SlowRecord:
    """A record of a target set that a reader waits for: a pipe, which nobody writes to before `let_go`."""

    def __init__(self, root: Path, teacher: str) -> None:
        self._path = root / "targets" / teacher / "docs" / "zarr.json"
        self._path.parent.mkdir(parents=True)
        os.mkfifo(self._path)
        self._writer: int | None = None

    def is_awaited(self) -> bool:
        if self._writer is None:
            with suppress(OSError):  # there is no reader
                self._writer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        return self._writer is not None

    def let_go(self) -> None:
        os.close(os.open(self._path, os.O_RDWR) if self._writer is None else self._writer)


def renamed_model(root: Path) -> tuple[Cache, FakeTeacher]:
    """A cache with targets of the model `old`, and the teacher under its name of now."""
    cache, corpus = make_corpus(root)
    before = teacher_for(corpus, model="old")
    commit(plan_targets(cache, before), before, [0])
    return cache, FakeTeacher(replace(before.identity, model="new"))


def test_a_service_is_ready_however_long_the_store_takes_for_the_look(tmp_path: Path) -> None:
    _, now = renamed_model(tmp_path / "c")
    slow = SlowRecord(tmp_path / "c", "a")
    with serving_teachers(hosted("fake", now)) as url:
        process = subprocess.Popen(
            [*COMMAND, "--port", "0", "--cache", str(tmp_path / "c"), "--teacher", f"fake={url}#fake"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdout is not None
        assert process.stderr is not None
        until(slow.is_awaited)
        said, _, _ = select.select([process.stdout], [], [], 0)
        slow.let_go()
        told = process.stderr.readline()
        process.terminate()
        stdout, stderr = process.communicate(timeout=300)
    assert said, "the ready line waits for the store"
    assert re.match("ready: ", stdout)
    assert "as model 'old'" in told
    assert (process.returncode, stderr) == (0, "")


def test_a_look_that_is_given_up_leaves_one_read_behind(tmp_path: Path) -> None:
    cache, now = renamed_model(tmp_path / "c")
    first, second = SlowRecord(tmp_path / "c", "a"), SlowRecord(tmp_path / "c", "b")

    async def give_up() -> None:
        look = asyncio.create_task(look_for_renamed([hosted("fake", now)], cache))
        await eventually(first.is_awaited)
        look.cancel()
        with suppress(asyncio.CancelledError):
            await look
        first.let_go()

    ended = threading.Thread(target=asyncio.run, args=(give_up(),))  # which waits for what it left in threads
    ended.start()
    try:
        until(lambda: not ended.is_alive())
        assert not second.is_awaited()
    finally:
        second.let_go()
        ended.join()


def test_a_teacher_that_is_not_up_keeps_no_other_from_being_looked_at(tmp_path: Path) -> None:
    cache, now = renamed_model(tmp_path / "c")

    async def look() -> RenamedLook:
        down, up = hosted("down", now), hosted("fake", now)
        up.start()
        await up.settled()
        try:
            return await look_for_renamed([down, up], cache)
        finally:
            await up.stop()

    seen = asyncio.run(look())
    assert list(seen.lines) == ["fake"]
    assert "as model 'old'" in seen.lines["fake"]
    assert seen.problem == "teacher 'down' is starting; retry later"


def test_the_doctor_answers_the_rest_when_the_store_does_not(tmp_path: Path) -> None:
    cache, now = renamed_model(tmp_path / "c")
    record = tmp_path / "c" / "targets" / "fake" / "docs" / "zarr.json"
    with serving_teachers(hosted("fake", now), cache=cache) as url:
        assert list(http.get(f"{url}/v1/doctor").json()["renamed"]) == ["fake"]
        record.unlink()
        record.symlink_to(record.name)  # a store that refuses, also to root: too many levels of links
        reply = http.get(f"{url}/v1/doctor")
        findings = {each.check: each for each in asyncio.run(check_service(url))[1]}
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert told["renamed"] == {}
    assert told["renamed_problem"].startswith("no teacher was looked at: targets/fake/docs/zarr.json: ")
    [unreadable] = told["store"]["unreadable"]
    assert (unreadable["name"], unreadable["kind"]) == ("docs", "store")
    assert unreadable["detail"].startswith("targets/fake/docs/zarr.json: ")
    assert told["memory"]["rss_bytes"] > 0
    assert findings["wire version"].level == "ok"
    assert (findings["corpus"].level, findings["corpus"].detail) == ("fail", unreadable["detail"])
    assert "the store did not give it" in findings["corpus"].way_out
    assert (findings["model name"].level, findings["model name"].detail) == ("not run", told["renamed_problem"])
