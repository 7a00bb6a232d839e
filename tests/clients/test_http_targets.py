from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from starlette.responses import Response

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.annotations import annotate
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.errors import (
    InvalidInput,
    SpecMismatch,
    TeacherFailed,
    Unavailable,
    UnknownCorpus,
    UnknownTeacher,
    UnsupportedField,
    WireVersionError,
)
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.wire import scores as wire
from potstill.cache.wire.scores import END
from potstill.cache.wire.stream import StreamHead, write_array, write_targets
from potstill.clients.http_corpus import HttpCorpus
from potstill.clients.http_targets import HttpCache, HttpTargets
from potstill.clients.retry import RetryPolicy
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from tests.support import http
from tests.support.contracts import TargetSetContract
from tests.support.corpora import byte_tokenizer, make_corpus, plan_targets, teacher_for, topics
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import commit, filled_cache
from tests.support.processes.faulty_proxy import faulty_proxy, random_faults
from tests.support.processes.servers import hosted, serving, serving_teachers

ONCE = RetryPolicy(attempts=1)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return filled_cache(tmp_path_factory.mktemp("filled") / "cache", TargetSetContract.FULL)


@pytest.fixture(scope="module")
def local(filled: Cache) -> TargetSet:
    return Cache.open(filled.root.url).targets("fake", "docs")


@pytest.fixture(scope="module")
def url(filled: Cache) -> Iterator[str]:
    with serving_teachers(hosted("other", FakeTeacher()), cache=filled) as address:
        yield address


@pytest.fixture(scope="module")
def remote(url: str) -> Iterator[HttpCache]:
    with HttpCache(url, timeout=120) as cache:
        yield cache


class TestTargetSet(TargetSetContract):
    @pytest.fixture
    def targets(self, filled: Cache) -> TargetSet:
        return Cache.open(filled.root.url).targets("fake", "docs")


class TestHttpTargets(TargetSetContract):
    @pytest.fixture
    def targets(self, remote: HttpCache) -> HttpTargets:
        return remote.targets("fake", "docs")


def test_a_corpus_is_read_like_its_files(remote: HttpCache, filled: Cache) -> None:
    files, there = filled.corpus("docs"), remote.corpus("docs")
    assert remote.corpora() == ["docs"]
    assert remote.teachers("docs") == ["fake"]
    assert len(there) == len(files)
    for name in ("name", "num_positions", "num_shards", "tokenizer_sha256", "vocab_size", "fingerprint"):
        assert getattr(there, name) == getattr(files, name)
    assert (there.spec.longest_row, there.spec.sources) == (files.spec.longest_row, files.spec.sources)
    for name in ("row_starts", "shard_rows", "shard_starts"):
        mine, theirs = getattr(there, name), getattr(files, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    rows = [len(files) - 1, 0, 5, 5]
    for one, other in zip(there.take(rows), files.take(rows), strict=True):
        assert one.dtype == np.uint32
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(there.row(3), files.row(3))
    np.testing.assert_array_equal(there.tokens(7, 1500), files.tokens(7, 1500))
    np.testing.assert_array_equal(there.row_ranges(rows), files.row_ranges(rows))
    np.testing.assert_array_equal(there.row_keys(0, 9), files.row_keys(0, 9))
    assert there.shard_of_row(40) == files.shard_of_row(40)
    assert there.tokenizer.to_str() == files.tokenizer.to_str()
    for refused in (lambda: there.find([bytes(16)]), there.corrupt_objects):
        with pytest.raises(UnsupportedField):
            refused()


def test_annotations_are_read_by_name(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "cache", texts=topics(2))
    kinds = ("bool", "int16", "float64")
    with serving_teachers(hosted("other", FakeTeacher()), cache=cache) as url, HttpCache(url, timeout=120) as remote:
        assert remote.corpus("docs").annotations() == []
        for kind in kinds:
            annotate(cache.root, corpus.annotated, kind, (np.arange(len(corpus)) % 3 == 0).astype(kind), {})
        assert remote.corpus("docs").annotations() == sorted(kinds)
        for kind in kinds:
            read = remote.corpus("docs").annotation(kind)
            assert read.dtype == kind
            np.testing.assert_array_equal(read, corpus.annotation(kind))


def test_names_that_are_not_there_are_refused_as_the_cache_refuses_them(remote: HttpCache) -> None:
    with pytest.raises(UnknownCorpus, match="nothing"):
        remote.corpus("nothing")
    with pytest.raises(UnknownTeacher, match="nobody"):
        remote.targets("nobody", "docs")


class CuttingProxy:
    """Passes requests on, and cuts Arrow answers after `cut` bytes as if that were all: HTTP finds nothing wrong."""

    def __init__(self, upstream: str, *, cut: int | None = None, times: int | None = None) -> None:
        self.upstream = upstream
        self.cut = cut
        self.times = times
        self.asked: list[str] = []
        self.sizes: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        target = f"{scope['path']}?{scope['query_string'].decode()}"
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"host", b"connection", b"content-length")]
        async with httpx.AsyncClient(timeout=http.SECONDS, verify=http.TRUSTED) as client:
            reply = await client.request(scope["method"], self.upstream + target, content=body, headers=headers)
        content = reply.content
        if reply.headers["content-type"].startswith("application/vnd.apache.arrow"):
            self.asked.append(target)
            self.sizes.append(len(content))
            if self.cut is not None and self.times != 0:
                self.times = None if self.times is None else self.times - 1
                content = content[: self.cut]
        kept = [(k.encode(), v.encode()) for k, v in reply.headers.items() if k in ("content-type", "etag")]
        kept.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": reply.status_code, "headers": kept})
        await send({"type": "http.response.body", "body": content})


def test_an_answer_cut_anywhere_is_never_a_short_one(url: str, local: TargetSet) -> None:
    proxy = CuttingProxy(url)
    starts = local.corpus.shard_starts.tolist()
    start, stop = starts[1] - 2, starts[2] + 2
    with serving(proxy) as through, HttpCache(through, retry=ONCE, timeout=120) as cache:
        targets = cache.targets("fake", "docs")
        TargetSetContract().assert_same(targets.read(start, stop), local.read(start, stop))
        size = proxy.sizes[-1]
        with http.stream("GET", through + proxy.asked[-1]) as reply:
            body = reply.read()
        ends = [at for at in range(len(body)) if body.startswith(b"\xff\xff\xff\xff", at)]
        edges = {at + by for at in ends[:-1] for by in (-1, 0, 1, 4, 8, 9)}
        for cut in sorted({at for at in edges if 0 <= at < ends[-1]} | set(range(0, size - 8, size // 12))):
            proxy.cut = cut
            with pytest.raises(Unavailable, match="cut short"):
                targets.read(start, stop)
        proxy.cut = 1000
        with pytest.raises(Unavailable, match="cut short"):
            targets.read_rows([0, 3, 5])
        with pytest.raises(Unavailable, match="cut short"):
            cache.corpus("docs").tokens(0, 500)


def test_a_read_goes_on_where_an_answer_broke_off(url: str, local: TargetSet) -> None:
    starts = local.corpus.shard_starts.tolist()
    proxy = CuttingProxy(url)
    with serving(proxy) as through, HttpCache(through, retry=RetryPolicy(base=0.0), timeout=120) as cache:
        targets = cache.targets("fake", "docs")
        targets.read(0, starts[3])
        # Two of the three blocks arrive, then one of the rest, and so on.
        proxy.cut, proxy.times = proxy.sizes[-1] * 5 // 6, 2
        del proxy.asked[:]
        TargetSetContract().assert_same(targets.read(0, starts[3]), local.read(0, starts[3]))
        begun = [int(httpx.URL(target).params["start"]) for target in proxy.asked]
        assert begun[0] == 0
        assert begun[1] == starts[2]
        proxy.times = 1
        proxy.cut = 4000
        rows = list(range(12))
        for one, other in zip(targets.read_rows(rows), local.read_rows(rows), strict=True):
            TargetSetContract().assert_same(one, other)


def test_a_connection_that_breaks_is_no_end_either(url: str, local: TargetSet) -> None:
    def choose(method: str, target: str) -> Any:
        return "truncate" if "start=" in target else None

    with faulty_proxy(url, choose) as proxy, HttpCache(proxy.endpoint, retry=ONCE, timeout=120) as cache:
        targets = cache.targets("fake", "docs")
        with pytest.raises(Unavailable):
            targets.read(0, 300)
        proxy.choose = random_faults(7, 0.3, kinds=("503", "drop before", "drop after", "truncate"))
    with faulty_proxy(url, random_faults(7, 0.3, kinds=("503", "drop before", "drop after", "truncate"))) as proxy:
        with HttpCache(proxy.endpoint, retry=RetryPolicy(attempts=30, base=0.0), timeout=60) as cache:
            targets = cache.targets("fake", "docs")
            TargetSetContract().assert_same(targets.read(0, 900), local.read(0, 900))
            rows = [9, 1, 30]
            for one, other in zip(targets.read_rows(rows), local.read_rows(rows), strict=True):
                TargetSetContract().assert_same(one, other)
        assert sum(proxy.met.values()) > 0


async def test_an_older_service_is_refused_naming_both_versions() -> None:
    async def older(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
            await send(head)
            await send({"type": "http.response.body", "body": b'{"format": "0", "corpora": []}'})

    with serving(older) as url, HttpCache(url, retry=ONCE, timeout=120) as cache:
        for refused in (cache.corpora, lambda: cache.corpus("docs")):
            with pytest.raises(WireVersionError, match="'0'.*'1'"):
                refused()


def test_a_closed_cache_refuses_to_read(url: str) -> None:
    with HttpCache(url, timeout=120) as cache:
        targets = cache.targets("fake", "docs")
    with pytest.raises(Unavailable, match="closed"):
        targets.read(0, 5)


def test_a_service_that_is_not_there_is_named(url: str) -> None:
    nobody = "http://127.0.0.1:9"
    with HttpCache(nobody, retry=ONCE, timeout=5) as cache, pytest.raises(Unavailable, match=nobody):
        cache.corpora()
    for bad in ("127.0.0.1:8700", "ftp://x", "http://"):
        with pytest.raises(InvalidInput):
            HttpCache(bad)


def test_another_corpus_under_the_name_is_not_mixed_in(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    filled_cache(root, Fields(k=4))
    cache = Cache.open(root, "r+")
    served = serving_teachers(hosted("other", FakeTeacher()), cache=cache)
    with served as url, HttpCache(url, retry=ONCE, timeout=120) as remote:
        targets, corpus = remote.targets("fake", "docs"), remote.corpus("docs")
        targets.read(0, 5)
        shutil.rmtree(root / "corpora")
        shutil.rmtree(root / "targets")
        again, other = make_corpus(root, texts=topics(3, characters=400))
        commit(plan_targets(again, teacher_for(other), fields=Fields(k=4)), teacher_for(other), [0])
        time.sleep(2.1)  # a service trusts what it opened for two seconds
        with pytest.raises(SpecMismatch, match="another corpus"):
            targets.read(0, 5)
        with pytest.raises(SpecMismatch, match="another corpus"):
            corpus.tokens(0, 5)


@contextmanager
def answering(filled: Cache, call: str, *parts: NDArray[Any]) -> Iterator[HttpCorpus]:
    """A corpus behind a service that answers one call, method and route, with these arrays, one a record batch."""
    service = create_app(Service([hosted("other", FakeTeacher())], cache=filled))
    head = StreamHead(batches=len(parts), length=sum(map(len, parts)), corpus=filled.corpus("docs").fingerprint)
    empty = head.schema([pa.field("values", pa.uint32())]).serialize().to_pybytes() + END
    body = b"".join(write_array(head, parts)) if parts else empty

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and f"{scope['method']} {scope['path']}" == call:
            await Response(body, media_type=wire.ARROW_MEDIA_TYPE)(scope, receive, send)
        else:
            await service(scope, receive, send)

    with serving(app) as url, HttpCache(url, timeout=120) as remote:
        yield remote.corpus("docs")


def test_other_rows_than_were_asked_for_are_refused(filled: Cache) -> None:
    first, second = (filled.corpus("docs").row(row) for row in (0, 1))
    cases: list[tuple[list[Any], str]] = [
        ([], "promised 0 rows for 2"),
        ([first], "promised 1 rows for 2"),
        ([first, second, second], "promised 3 rows for 2"),
        ([first, second[:-1]], "for a row of"),
        ([np.stack([first, first], axis=1), np.stack([second, second], axis=1)], "for a row of"),
    ]
    for parts, words in cases:
        with (
            answering(filled, "POST /v1/corpora/docs/rows", *parts) as corpus,
            pytest.raises(TeacherFailed, match=words),
        ):
            corpus.take([0, 1])
    with answering(filled, "POST /v1/corpora/docs/rows", first, second) as corpus:
        for got, expected in zip(corpus.take([0, 1]), (first, second), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_targets_that_no_teacher_has_are_refused(filled: Cache, local: TargetSet) -> None:
    service = create_app(Service([hosted("other", FakeTeacher())], cache=filled))
    want = Fields(k=2)
    good = local.read(0, 3, fields=want)
    head = StreamHead(
        batches=1, length=3, corpus=filled.corpus("docs").fingerprint, identity=local.identity, fields=want
    )
    sent = good

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and b"start=" in scope["query_string"]:
            body = b"".join(write_targets(head, [[sent]]))
            await Response(body, media_type=wire.ARROW_MEDIA_TYPE)(scope, receive, send)
        else:
            await service(scope, receive, send)

    with serving(app) as url, HttpCache(url, retry=ONCE, timeout=120) as remote:
        targets = remote.targets("fake", "docs")
        TargetSetContract().assert_same(targets.read(0, 3, fields=want), good)
        for changed, words in (
            ({"log_tail": good.log_tail + np.float32(np.nan)}, "NaN"),
            ({"ids": good.ids | np.uint32(2**31)}, "its vocabulary has"),
            ({"ids": good.ids * np.uint32(0)}, "id 0 twice"),
        ):
            sent = replace(good, **changed)
            with pytest.raises(TeacherFailed, match=words):
                targets.read(0, 3, fields=want)


def test_an_array_of_nothing_is_refused_and_not_asked_for_again(filled: Cache) -> None:
    with (
        answering(filled, "GET /v1/corpora/docs/tokens") as corpus,
        pytest.raises(TeacherFailed, match="nothing at all"),
    ):
        corpus.tokens(3, 3)


@pytest.mark.slow
def test_a_large_range_is_streamed_in_little_memory(tmp_path: Path) -> None:
    """Nearly 400 MiB of answer: neither end may hold it. Both are this process."""
    cache = wide_cache(tmp_path / "cache")
    corpus = cache.corpus("docs")
    with serving_teachers(hosted("other", FakeTeacher()), cache=cache) as url, HttpCache(url, timeout=60) as remote:
        targets = remote.targets("fake", "docs")
        for _ in targets.stream(0, 20_000):  # opens, warms up
            pass
        before = psutil.Process().memory_info().rss
        most = answered = 0
        for part in targets.stream(0, corpus.num_positions):
            answered += part.ids.nbytes + part.logprobs.nbytes
            most = max(most, psutil.Process().memory_info().rss - before)
    assert answered > 380 << 20
    assert most < 120 << 20


def wide_cache(root: Path) -> Cache:
    """800,000 positions of the same few rows, K=64, in four shards."""
    rng = np.random.default_rng(0)
    cache = Cache.open(root, "r+")
    rows = [rng.integers(0, 255, 1000).astype(np.uint32) for _ in range(800)]
    corpus = ingest_rows(
        cache.root, "docs", rows, byte_tokenizer(), IngestPlan(row_tokens=1000, shard_positions=200_000)
    )
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher, fields=Fields(k=64))
    some = Targets.concat([teacher.targets(row, Fields(k=64)) for row in rows[:20]])
    for shard, count in enumerate(np.diff(corpus.shard_starts).tolist()):
        repeats = -(-count // some.num_positions)
        assert targets.write_shard(shard, Targets.concat([some] * repeats)[:count], teacher.provenance)
    return cache
