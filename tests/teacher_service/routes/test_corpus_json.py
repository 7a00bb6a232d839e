"""Targets as JSON: bounded, as the JSON of the wire, and held until they are sent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.responses import JSONResponse

from potstill.cache import Cache, Fields, Targets
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.wire import scores as wire
from potstill.teacher_service.routes.corpora.targets_json import json_pieces
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import filled_cache
from tests.support.processes.servers import hosted, refused, serving_teachers, targets_of


def dense_cache(root: Path) -> Cache:
    return filled_cache(root, Fields(k=4, dense=True), encoding="f32", missing=0)


def test_json_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    cache = dense_cache(tmp_path / "cache")
    targets = cache.targets("fake", "docs")
    size = targets.fields.bytes_per_position(targets.identity.vocab_size)
    limits = LimitSettings(max_answer_bytes=10 * size, max_range_positions=1000)
    with serving_teachers(hosted("other", FakeTeacher()), cache=cache, limits=limits) as url:
        address, ask = f"{url}/v1/corpora/docs/targets/fake", {"accept": "application/json"}
        whole = http.get(address, params={"start": 0, "stop": 10}, headers=ask)
        expected = wire.targets_to_json(targets.read(0, 10))
        assert whole.headers["content-type"] == "application/json"
        assert whole.json() == {
            "format": wire.WIRE_VERSION,
            "identity": targets.identity.to_json(),
            "rows": [expected],
        }
        over = http.get(address, params={"start": 0, "stop": 11}, headers=ask)
        detail = refused(over, 422, "limit_exceeded")
        assert f"{11 * size} bytes" in detail
        assert f"max_answer_bytes={10 * size}" in detail
        over = http.post(f"{address}/rows", json={"rows": [0]}, headers=ask)
        assert "max_answer_bytes" in refused(over, 422, "limit_exceeded")
        assert targets_of(url, start=0, stop=11).status_code == 200


def test_json_holds_its_bytes_and_a_place_until_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = dense_cache(tmp_path / "cache")
    targets = cache.targets("fake", "docs")
    size = targets.fields.bytes_per_position(targets.identity.vocab_size)
    gate, seen = threading.Event(), threading.Event()
    read = TargetSet.read

    def gated(self: TargetSet, *args: Any, **kwargs: Any) -> Targets:
        seen.set()
        assert gate.wait(300)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(TargetSet, "read", gated)

    def second(limits: LimitSettings) -> httpx.Response:
        gate.clear()
        seen.clear()
        with (
            serving_teachers(hosted("other", FakeTeacher()), cache=cache, limits=limits) as url,
            ThreadPoolExecutor(1) as pool,
        ):
            address, ask = f"{url}/v1/corpora/docs/targets/fake?start=0&stop=10", {"accept": "application/json"}
            first = pool.submit(http.get, address, headers=ask)
            assert seen.wait(300)
            refusal = http.get(address, headers=ask)
            gate.set()
            assert first.result().status_code == 200
            assert http.get(address, headers=ask).status_code == 200
            return refusal

    assert "max_streams" in refused(second(LimitSettings(max_streams=1)), 429, "overloaded")
    assert "bytes of answers" in refused(second(LimitSettings(max_answer_bytes_in_flight=15 * size)), 429, "overloaded")


def test_json_in_pieces_is_the_json_of_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = Fields(k=4, draws=50, temperatures=(0.5, 2.0), entropy=True, dense=True)
    teacher = FakeTeacher()
    rows = [np.array(tokens, np.uint32) for tokens in ([1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 5])]
    for asked in (fields, Fields(k=0, entropy=True)):
        targets = [teacher.targets(row, asked) for row in rows]
        answer = wire.answer_to_json(wire.ScoreAnswer(teacher.identity, targets))
        expected = JSONResponse({"format": wire.WIRE_VERSION, **answer}).body
        for elements in (1 << 14, 100, 7):
            monkeypatch.setattr("potstill.teacher_service.routes.corpora.targets_json._ELEMENTS", elements)
            assert b"".join(json_pieces(teacher.identity, targets.copy)) == expected
