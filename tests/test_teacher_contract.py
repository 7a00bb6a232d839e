"""Every teacher there is, held to one contract: they nest because they are alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache import Cache
from cache.cached import CachedTeacher, KeepPolicy
from cache.types import Teacher
from clients import HttpTeacher
from teacher_service.hosted import Keep
from teacher_service.replicas import LocalPool
from teacher_service.vllm_teacher import VllmTeacher
from tests.contracts import FieldsTeacherContract, TopKTeacherContract
from tests.fakes import FakeTeacher
from tests.servers import hosted, opens, serving_teachers


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
