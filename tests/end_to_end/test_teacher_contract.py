"""Every teacher there is, held to one contract: they nest because they are alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.types import Teacher
from potstill.clients.http_teacher import HttpTeacher
from potstill.teacher_service.engine.vllm_teacher import VllmTeacher
from potstill.teacher_service.hosting.hosted_teacher import Keep
from potstill.teacher_service.replicas.pool import LocalPool
from tests.support.contracts import FieldsTeacherContract, TopKTeacherContract
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, opens, serving_teachers


class TestFake(FieldsTeacherContract):
    @pytest.fixture
    def teacher(self) -> Teacher:
        return FakeTeacher()


class TestFakeOfTheTopKOnly(TopKTeacherContract):
    @pytest.fixture
    def teacher(self) -> Teacher:
        return FakeTeacher(top_k_only=True)


class TestLocalPool(FieldsTeacherContract):
    @pytest.fixture
    async def teacher(self) -> AsyncIterator[Teacher]:
        async with LocalPool.open(opens(FakeTeacher())) as pool:
            yield pool


class TestVllm(FieldsTeacherContract):
    @pytest.fixture
    def teacher(self, vllm_teacher: VllmTeacher) -> Teacher:
        return vllm_teacher


class TestCachedVllm(FieldsTeacherContract):
    @pytest.fixture
    async def teacher(self, vllm_teacher: VllmTeacher, tmp_path: Path) -> AsyncIterator[Teacher]:
        cache = Cache.open(tmp_path / "c", mode="r+")
        async with CachedTeacher.open(vllm_teacher, name="tiny", cache=cache, policy=KeepPolicy(k=64)) as cached:
            yield cached


class TestHttpBeforeCacheBeforeFake(FieldsTeacherContract):
    @pytest.fixture
    async def teacher(self, tmp_path: Path) -> AsyncIterator[Teacher]:
        keep = Keep(Cache.open(tmp_path / "c", mode="r+"), KeepPolicy(k=64))
        with serving_teachers(hosted("fake", FakeTeacher(), keep)) as url:
            async with HttpTeacher.open(url, "fake") as client:
                yield client


class TestHttpBeforeFake(FieldsTeacherContract):
    @pytest.fixture
    async def teacher(self) -> AsyncIterator[Teacher]:
        with serving_teachers(hosted("fake", FakeTeacher())) as url:
            async with HttpTeacher.open(url, "fake") as client:
                yield client
