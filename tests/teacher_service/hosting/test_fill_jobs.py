"""Jobs of callers with keys: what their quota allows, and what becomes of a job whose key changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache import Cache
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.keys_file import add_key, remove_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import AccessSettings, LimitSettings
from tests.support import http
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.fakes import MoodyTeacher
from tests.support.fill_requests import BODY
from tests.support.processes.servers import hosted, refused, serving, wait_ready
from tests.support.waiting import until

ONE_BATCH = {**BODY, "in_flight": 1}


class Guarded:
    """A service with a key of each name, and a teacher that waits at a gate."""

    def __init__(self, folder: Path, **quotas: Quota) -> None:
        self.cache: Cache = make_corpus(folder / "cache", texts=topics(3, characters=500), shard_positions=300)[0]
        self.teacher = MoodyTeacher(teacher_for(self.cache.corpus("docs")))
        self.file = folder / "keys.toml"
        self.keys = {name: add_key(self.file, name, Role.BATCH, quota) for name, quota in quotas.items()}
        self.url = ""

    @contextmanager
    def served(self, limits: LimitSettings | None = None) -> Iterator[Guarded]:
        access = Access.of(AccessSettings(keys_file=str(self.file)))
        self.service = Service(
            [hosted("fake", self.teacher)], cache=self.cache, access=access, limits=limits or LimitSettings()
        )
        with serving(create_app(self.service)) as self.url:
            wait_ready(self.url)
            yield self

    def change_keys(self) -> None:
        """Have the service read the keys again."""
        assert self.service.access.keys is not None
        self.service.access.keys.reload()

    def call(self, method: str, name: str, body: Any = None, corpus: str = "docs") -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[name]}"}
        address = f"{self.url}/v1/corpora/{corpus}/fill/fake"
        return http.request(method, address, json=body, headers=headers)

    def ended(self, name: str, corpus: str = "docs") -> dict[str, Any]:
        until(lambda: self.call("GET", name, corpus=corpus).json()["state"] in ("done", "failed"))
        return dict(self.call("GET", name, corpus=corpus).json())


def test_a_batch_is_within_the_quota_of_the_day(tmp_path: Path) -> None:
    with Guarded(tmp_path, ann=Quota(tokens_per_day=4000)).served() as guarded:
        assert guarded.cache.corpus("docs").num_positions < 4000
        assert guarded.call("PUT", "ann", {"fields": BODY["fields"]}).json()["batch_tokens"] == 4000
        assert guarded.ended("ann")["state"] == "done"


def test_a_row_over_the_quota_of_the_day_is_refused(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, ann=Quota(tokens_per_day=20))
    longest = guarded.cache.corpus("docs").spec.longest_row
    with guarded.served():
        detail = refused(guarded.call("PUT", "ann", BODY), 422, "limit_exceeded")
    assert f"a row of {longest} tokens, over tokens_per_day=20" in detail
    assert guarded.cache.fresh().teachers("docs") == []


@pytest.mark.parametrize(("role", "kind"), [(None, "unauthenticated"), (Role.TRAINER, "forbidden")])
def test_the_job_of_a_key_that_may_not_any_more_ends(tmp_path: Path, role: Role | None, kind: str) -> None:
    with Guarded(tmp_path, ann=Quota(), bob=Quota()).served() as guarded:
        guarded.teacher.gate.clear()
        guarded.call("PUT", "ann", ONE_BATCH)
        until(lambda: guarded.teacher.calls > 0)
        if role is None:
            remove_key(guarded.file, "ann")
        else:
            guarded.file.write_text(guarded.file.read_text().replace('"batch"', f'"{role.value}"', 1))
        guarded.change_keys()
        calls = guarded.teacher.calls
        guarded.teacher.gate.set()
        ended = guarded.ended("bob")
        assert (ended["state"], ended["error"]["kind"]) == ("failed", kind)
        assert "the key 'ann', which started this fill" in ended["error"]["detail"]
        assert guarded.teacher.calls == calls
        guarded.call("PUT", "bob", ONE_BATCH)
        assert guarded.ended("bob")["state"] == "done"


def test_a_quota_that_is_changed_is_that_of_the_running_job(tmp_path: Path) -> None:
    with Guarded(tmp_path, ann=Quota(tokens_per_day=100_000), bob=Quota()).served() as guarded:
        guarded.teacher.gate.clear()
        guarded.call("PUT", "ann", ONE_BATCH)
        until(lambda: guarded.teacher.calls > 0)
        guarded.file.write_text(guarded.file.read_text().replace("tokens_per_day = 100000", "tokens_per_day = 201"))
        guarded.change_keys()
        guarded.teacher.gate.set()
        until(lambda: guarded.call("GET", "ann").json()["told_to_wait"] is not None)
        assert "tokens_per_day=201" in guarded.call("GET", "ann").json()["told_to_wait"]["detail"]


def test_the_spent_quota_of_one_key_keeps_no_other_key_from_filling(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, ann=Quota(tokens_per_day=60), bob=Quota())
    names = ("docs", "docs1", "docs2")
    for name in names[1:]:
        make_corpus(tmp_path / "cache", name=name, texts=topics(3, characters=500), shard_positions=300)
    with guarded.served(LimitSettings(max_fills_running=1)):
        for name in names[:2]:
            guarded.call("PUT", "ann", ONE_BATCH, name)
            until(lambda name=name: guarded.call("GET", "ann", corpus=name).json()["told_to_wait"] is not None)  # type: ignore[misc]
        guarded.call("PUT", "bob", ONE_BATCH, names[2])
        assert guarded.ended("bob", names[2])["state"] == "done"
        assert guarded.call("GET", "ann").json()["state"] == "waiting"
