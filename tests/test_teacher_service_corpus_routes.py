from __future__ import annotations

import asyncio
import io
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi.responses import JSONResponse

from cache import Cache, Fields, Targets, wire
from cache.delete import plan_shards, remove
from cache.targets import TargetSet
from cache.wire_stream import END
from teacher_service.corpus_json import json_pieces
from teacher_service.corpus_reads import RangeRead
from teacher_service.request_limits import bytes_per_position
from teacher_service.settings import LimitSettings
from teacher_service.streamed import ReadSlots, StreamedAnswer
from tests.corpora import plan_targets, teacher_for
from tests.fakes import FakeTeacher
from tests.filled_caches import commit, filled_cache
from tests.servers import hosted, serving, serving_teachers

ARROW = "application/vnd.apache.arrow.stream"
TOP_K = ("ids", "logprobs", "log_tail", "label_logprob")
FIELDS = Fields(k=8, entropy=True)


def refused(reply: httpx.Response, status: int, kind: str) -> str:
    """Check the one error shape; returns the detail."""
    assert reply.status_code == status, reply.text[:500]
    body = reply.json()
    assert set(body) == {"kind", "detail"}
    assert body["kind"] == kind
    assert "\n" not in body["detail"]
    return str(body["detail"])


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Only read."""
    return filled_cache(tmp_path_factory.mktemp("filled") / "cache", FIELDS, missing=2)


@pytest.fixture
def own(filled: Cache, tmp_path: Path) -> Cache:
    """A copy that a test may change."""
    shutil.copytree(filled.root.url, tmp_path / "cache")
    return Cache.open(tmp_path / "cache", "r+")


@contextmanager
def served(cache: Cache | None) -> Iterator[str]:
    limits = LimitSettings(max_range_positions=50, max_stream_positions=1200, max_rows=20)
    with serving_teachers(hosted("other", FakeTeacher()), cache=cache, limits=limits) as address:
        yield address


@pytest.fixture(scope="module")
def url(filled: Cache) -> Iterator[str]:
    with served(filled) as address:
        yield address


@pytest.fixture
def own_url(own: Cache) -> Iterator[str]:
    with served(own) as address:
        yield address


def targets_of(url: str, **params: Any) -> httpx.Response:
    return httpx.get(f"{url}/v1/corpora/docs/targets/fake", params=params, timeout=60)


def test_corpora_are_described(url: str, filled: Cache) -> None:
    corpus = filled.corpus("docs")
    counts = {
        "name": "docs",
        "rows": len(corpus),
        "positions": corpus.num_positions,
        "shards": corpus.num_shards,
        "tokenizer_sha256": corpus.tokenizer_sha256,
    }
    described = httpx.get(f"{url}/v1/corpora").json()
    assert described == {"format": wire.WIRE_VERSION, "corpora": [{**counts, "teachers": ["fake"]}]}
    one = httpx.get(f"{url}/v1/corpora/docs").json()
    assert counts.items() <= one.items()
    assert one["format"] == wire.WIRE_VERSION
    assert one["spec"]["fingerprint"] == corpus.fingerprint
    assert one["annotations"] == []
    done = corpus.num_shards - 2
    assert one["teachers"]["fake"]["committed"] == [[0, done]]
    assert (one["teachers"]["fake"]["shards"], one["teachers"]["fake"]["shards_committed"]) == (done + 2, done)


def test_a_target_set_is_described_without_a_range(url: str, filled: Cache) -> None:
    reply = targets_of(url)
    assert reply.headers["cache-control"] == "no-cache"
    described = reply.json()
    targets = filled.targets("fake", "docs")
    assert described["format"] == wire.WIRE_VERSION
    assert described["identity"] == targets.identity.to_json()
    assert described["fields"] == targets.fields.to_json()
    assert described["names"] == ["top_k", "entropy"]
    assert described["encoding"]["name"] == "u8"
    assert described["limits"] == {"max_rows": 20, "max_stream_positions": 1200}


def test_pyarrow_alone_reads_a_stream_of_one_batch_a_block(url: str, filled: Cache) -> None:
    corpus, kept = filled.corpus("docs"), filled.targets("fake", "docs")
    stop = int(corpus.shard_starts[2]) + 10
    reply = targets_of(url, start=3, stop=stop)
    assert reply.headers["content-type"] == ARROW
    assert reply.content.endswith(END)
    with pa.ipc.open_stream(reply.content) as reader:
        metadata = reader.schema.metadata
        batches = list(reader)
    assert metadata[b"potstill.format"] == wire.WIRE_VERSION.encode()
    assert (metadata[b"potstill.batches"], metadata[b"potstill.length"]) == (b"3", str(stop - 3).encode())
    starts = corpus.shard_starts.tolist()
    assert [batch.num_rows for batch in batches] == [starts[1] - 3, starts[2] - starts[1], 10]
    expected = kept.read(3, stop)
    table = pa.Table.from_batches(batches)
    assert table.column_names == [*TOP_K, "entropy"]
    ids = np.concatenate([batch.column("ids").flatten().to_numpy() for batch in batches]).reshape(-1, 8)
    np.testing.assert_array_equal(ids, expected.ids)
    assert expected.entropy is not None
    np.testing.assert_array_equal(table.column("entropy").to_numpy(), expected.entropy)


def test_blocks_are_cut_where_chunks_are_and_promised_in_number(filled: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = filled.targets("fake", "docs")
    starts = targets.corpus.shard_starts.tolist()
    monkeypatch.setattr("teacher_service.corpus_reads.BLOCK_BYTES", 64 * 100)  # 64 positions
    for start, stop in ((0, 1), (0, 64), (1, 65), (63, 64), (5, starts[3]), (starts[1] - 1, starts[2] + 1)):
        read = RangeRead(targets, start, stop, Fields(k=8))
        blocks = list(read._blocks())
        assert [blocks[0][0], blocks[-1][1]] == [start, stop]
        assert all(before[1] == after[0] for before, after in pairwise(blocks))
        assert read.head().batches == len(blocks)
        for first, _ in blocks[1:]:
            low = max(at for at in starts if at <= first)
            assert (first - low) % 64 == 0


@pytest.mark.parametrize(
    ("params", "columns"),
    [
        ({"fields": "top_k"}, TOP_K),
        ({"fields": "top_k", "k": 3}, TOP_K),
        ({"fields": "entropy"}, ("log_tail", "label_logprob", "entropy")),
        ({"k": 0}, ("log_tail", "label_logprob", "entropy")),
        ({"fields": "entropy", "k": 2}, (*TOP_K, "entropy")),
    ],
)
def test_fields_are_chosen_by_name(url: str, params: dict[str, Any], columns: tuple[str, ...]) -> None:
    with pa.ipc.open_stream(targets_of(url, start=0, stop=5, **params).content) as reader:
        assert reader.schema.names == list(columns)
        if "ids" in columns:
            assert reader.schema.field("ids").type.list_size == params.get("k", 8)


def test_json_has_the_version_and_is_bounded_by_itself(url: str, filled: Cache) -> None:
    def get(stop: int) -> httpx.Response:
        address = f"{url}/v1/corpora/docs/targets/fake"
        return httpx.get(address, params={"start": 0, "stop": stop}, headers={"accept": "application/json"})

    answer = get(50).json()
    assert answer["format"] == wire.WIRE_VERSION
    assert answer["rows"][0]["ids"] == filled.targets("fake", "docs").read(0, 50).ids.tolist()
    assert "max_range_positions=50" in refused(get(51), 422, "limit_exceeded")
    assert targets_of(url, start=0, stop=51).status_code == 200


def dense_cache(root: Path) -> Cache:
    return filled_cache(root, Fields(k=4, dense=True), encoding="f32", missing=0)


def test_json_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    cache = dense_cache(tmp_path / "cache")
    targets = cache.targets("fake", "docs")
    size = bytes_per_position(targets.fields, targets.identity.vocab_size)
    limits = LimitSettings(max_answer_bytes=10 * size, max_range_positions=1000)
    with serving_teachers(hosted("other", FakeTeacher()), cache=cache, limits=limits) as url:
        address, ask = f"{url}/v1/corpora/docs/targets/fake", {"accept": "application/json"}
        whole = httpx.get(address, params={"start": 0, "stop": 10}, headers=ask)
        expected = wire.targets_to_json(targets.read(0, 10))
        assert whole.headers["content-type"] == "application/json"
        assert whole.json() == {
            "format": wire.WIRE_VERSION,
            "identity": targets.identity.to_json(),
            "rows": [expected],
        }
        over = httpx.get(address, params={"start": 0, "stop": 11}, headers=ask)
        detail = refused(over, 422, "limit_exceeded")
        assert f"{11 * size} bytes" in detail
        assert f"max_answer_bytes={10 * size}" in detail
        over = httpx.post(f"{address}/rows", json={"rows": [0]}, headers=ask)
        assert "max_answer_bytes" in refused(over, 422, "limit_exceeded")
        assert targets_of(url, start=0, stop=11).status_code == 200


def test_json_holds_its_bytes_and_a_place_until_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = dense_cache(tmp_path / "cache")
    targets = cache.targets("fake", "docs")
    size = bytes_per_position(targets.fields, targets.identity.vocab_size)
    gate, seen = threading.Event(), threading.Event()
    read = TargetSet.read

    def gated(self: TargetSet, *args: Any, **kwargs: Any) -> Targets:
        seen.set()
        assert gate.wait(20)
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
            first = pool.submit(httpx.get, address, headers=ask, timeout=30)
            assert seen.wait(20)
            refusal = httpx.get(address, headers=ask)
            gate.set()
            assert first.result().status_code == 200
            assert httpx.get(address, headers=ask).status_code == 200
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
            monkeypatch.setattr("teacher_service.corpus_json._ELEMENTS", elements)
            assert b"".join(json_pieces(teacher.identity, targets.copy)) == expected


def test_bad_ranges_names_and_fields_are_refused(url: str, filled: Cache) -> None:
    last = filled.corpus("docs").num_positions
    refused(targets_of(url, start=last - 1, stop=last), 404, "not_committed")
    assert "max_stream_positions=1200" in refused(targets_of(url, start=0, stop=1201), 422, "limit_exceeded")
    refused(targets_of(url, start=last, stop=last + 1), 422, "invalid_input")
    for start, stop in ((5, 5), (5, 4), (-1, 4), ("a", 4), ("", 4), (last, last + 9)):
        refused(targets_of(url, start=start, stop=stop), 422, "invalid_input")
    for start, stop in ((0, 2**64), (2**70, 2**71)):
        refused(targets_of(url, start=start, stop=stop), 422, "limit_exceeded")
    assert "stop" in refused(targets_of(url, start=0), 422, "invalid_input")
    assert "k=9" in refused(targets_of(url, start=0, stop=1, k=9), 422, "unsupported_field")
    assert "draws" in refused(targets_of(url, start=0, stop=1, fields="draws"), 422, "unsupported_field")
    assert "dense, entropy" not in refused(targets_of(url, start=0, stop=1, fields="dence"), 422, "invalid_input")
    refused(targets_of(url, start=0, stop=1, fields=""), 422, "invalid_input")
    for path, kind in (("docs/targets/nobody", "unknown_teacher"), ("nothing/targets/fake", "unknown_corpus")):
        refused(httpx.get(f"{url}/v1/corpora/{path}", params={"start": 0, "stop": 1}), 404, kind)
    for name in ("..", "%2e%2e", "a%2Fb", "x" * 300, "%00"):
        for path in (f"{name}/targets/fake", f"docs/targets/{name}", f"{name}/tokens", f"docs/annotations/{name}"):
            reply = httpx.get(f"{url}/v1/corpora/{path}", params={"start": 0, "stop": 1})
            # A path with `..` is that of another route: the client, or the server, takes it so.
            assert reply.status_code in (404, 422) or name == "..", (path, reply.text)


def test_rows_are_asked_for_by_number_as_json_or_arrow(url: str, filled: Cache) -> None:
    address = f"{url}/v1/corpora/docs/targets/fake/rows"
    kept = filled.targets("fake", "docs")
    reply = httpx.post(address, json={"rows": [5, 0, 5], "fields": ["top_k"], "k": 2})
    with pa.ipc.open_stream(reply.content) as reader:
        batches = list(reader)
    for batch, expected in zip(batches, kept.read_rows([5, 0, 5], k=2, fields=Fields(k=8)), strict=True):
        np.testing.assert_array_equal(batch.column("ids").flatten().to_numpy().reshape(-1, 2), expected.ids)
    answer = httpx.post(address, json={"rows": [0]}, headers={"accept": "application/json"}).json()
    assert answer["rows"][0]["ids"] == kept.read_rows([0])[0].ids.tolist()
    assert "max_rows=20" in refused(httpx.post(address, json={"rows": list(range(21))}), 422, "limit_exceeded")
    refused(httpx.post(address, content=b"x", headers={"content-type": "text/plain"}), 415, "media_type")
    bodies: list[Any] = [
        {},
        [],
        {"rows": []},
        {"rows": [True]},
        {"rows": [-1]},
        {"rows": [2**80]},
        {"rows": [0], "row": 1},
    ]
    for body in bodies:
        refused(httpx.post(address, json=body), 422, "invalid_input")
    refused(httpx.post(address, content=b"x", headers={"content-type": ARROW}), 422, "invalid_input")
    refused(httpx.post(address, json={"rows": [10_000]}), 422, "invalid_input")
    refused(httpx.post(address, json={"rows": [len(filled.corpus("docs")) - 1]}), 404, "not_committed")


def test_an_etag_names_the_content_and_saves_its_reading(own_url: str, own: Cache) -> None:
    address, params = f"{own_url}/v1/corpora/docs/targets/fake", {"start": "0", "stop": "100"}
    first = httpx.get(address, params=params)
    etag = first.headers["etag"]
    assert etag.startswith('"')
    assert first.headers["cache-control"] == "private, immutable"
    for held in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        again = httpx.get(address, params=params, headers={"if-none-match": held})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert httpx.get(address, params=params, headers={"if-none-match": '"other"'}).status_code == 200
    head = httpx.head(address, params=params)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", etag)
    assert head.headers["content-type"] == ARROW
    others: list[dict[str, Any]] = [{"stop": 101}, {"k": 4}, {"fields": "top_k"}, {"start": 1}]
    found = [httpx.head(address, params={**params, **other}).headers["etag"] for other in others]
    as_json = httpx.head(address, params={**params, "stop": 50}, headers={"accept": "application/json"})
    found += [as_json.headers["etag"], httpx.head(address, params={**params, "stop": 50}).headers["etag"]]
    assert len({etag, *found}) == len(found) + 1
    # The objects' hashes are in the commits: what is there need not be read, and is not.
    shutil.rmtree(next((Path(own.root.url) / "targets/fake/docs/segments").glob("000000-*")))
    assert httpx.head(address, params=params).headers["etag"] == etag


def test_an_etag_outlives_the_service_and_changes_with_a_shard(own: Cache) -> None:
    def etags() -> tuple[str, str]:
        with serving_teachers(hosted("other", FakeTeacher()), cache=own) as url:
            starts = own.corpus("docs").shard_starts.tolist()
            first, second = (
                httpx.head(f"{url}/v1/corpora/docs/targets/fake", params={"start": a, "stop": b})
                for a, b in ((0, starts[1]), (starts[1], starts[2]))
            )
            return first.headers["etag"], second.headers["etag"]

    before = etags()
    assert etags() == before
    (removal,) = plan_shards(own.root, "fake", "docs", None, [1])
    remove(own.root, removal)
    fresh = own.fresh()
    teacher = teacher_for(fresh.corpus("docs"))
    commit(plan_targets(fresh, teacher, fields=FIELDS), teacher, [1])
    after = etags()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_running_service_sees_a_shard_that_is_committed_deleted_and_filled_again(own: Cache, own_url: str) -> None:
    corpus = own.corpus("docs")
    teacher = teacher_for(corpus)
    shard = corpus.num_shards - 2
    params = {"start": int(corpus.shard_starts[shard]), "stop": int(corpus.shard_starts[shard]) + 1}
    refused(targets_of(own_url, **params), 404, "not_committed")
    commit(plan_targets(own.fresh(), teacher, fields=FIELDS), teacher, [shard])
    first = targets_of(own_url, **params)
    assert first.status_code == 200
    (removal,) = plan_shards(own.root, "fake", "docs", None, [shard])
    remove(own.root, removal)
    until(lambda: targets_of(own_url, **params).status_code == 404)
    commit(plan_targets(own.fresh(), teacher, fields=FIELDS), teacher, [shard])
    until(lambda: targets_of(own_url, **params).status_code == 200)
    again = targets_of(own_url, **params)
    assert again.headers["etag"] != first.headers["etag"]
    assert again.content == first.content


def until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_wire_version_is_refused_naming_both(url: str) -> None:
    newer = {"potstill-format": "2"}
    for path in ("", "/docs", "/docs/targets/fake", "/docs/tokens", "/docs/rows", "/docs/tokenizer"):
        detail = refused(httpx.get(f"{url}/v1/corpora{path}", headers=newer), 400, "wire_version")
        assert "'2'" in detail
        assert "'1'" in detail
    refused(httpx.put(f"{url}/v1/corpora/docs/fill/other", json={}, headers=newer), 400, "wire_version")
    metadata = {b"potstill.format": b"2"}
    schema = pa.schema([pa.field("rows", pa.int64())], metadata=metadata)
    batch = pa.record_batch([pa.array([0])], schema=schema)
    body = b"".join([schema.serialize(), batch.serialize(), END])
    for path in ("/docs/rows", "/docs/targets/fake/rows"):
        reply = httpx.post(f"{url}/v1/corpora{path}", content=body, headers={"content-type": ARROW})
        refused(reply, 400, "wire_version")


def test_every_body_says_which_wire_version_it_is(url: str) -> None:
    for path in ("", "/docs", "/docs/targets/fake"):
        assert httpx.get(f"{url}/v1/corpora{path}").json()["format"] == wire.WIRE_VERSION
    for path in ("tokens", "rows", "row_keys", "shard_rows", "shard_starts", "targets/fake?start=0&stop=1"):
        with pa.ipc.open_stream(io.BytesIO(httpx.get(f"{url}/v1/corpora/docs/{path}").content)) as reader:
            assert reader.schema.metadata[b"potstill.format"] == wire.WIRE_VERSION.encode()
    assert httpx.get(f"{url}/v1/corpora/docs/tokenizer").headers["potstill-format"] == wire.WIRE_VERSION


def test_without_a_cache_there_is_no_corpus() -> None:
    with serving_teachers(hosted("other", FakeTeacher())) as url:
        assert httpx.get(f"{url}/v1/corpora").json() == {"format": wire.WIRE_VERSION, "corpora": []}
        assert "--cache" in refused(targets_of(url, start=0, stop=1), 404, "unknown_corpus")


def damage(cache: Cache, shard: int) -> None:
    """Cut an object of a shard's segment in half."""
    (segment,) = (Path(cache.root.url) / "targets/fake/docs/segments").glob(f"{shard:06d}-*")
    (chunk,) = (file for file in (segment / "ids").rglob("*") if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])


def test_damage_found_before_the_first_block_is_an_error_and_later_breaks_the_connection(
    own_url: str, own: Cache
) -> None:
    damage(own, 2)
    starts = own.corpus("docs").shard_starts.tolist()
    refused(targets_of(own_url, start=starts[2], stop=starts[2] + 5), 500, "corrupt_segment")
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete|peer closed"):
        targets_of(own_url, start=0, stop=starts[3])
    assert targets_of(own_url, start=0, stop=starts[2]).status_code == 200


class CountedPieces:
    """Pieces of 1 MiB without end; counts those that were read."""

    def __init__(self) -> None:
        self.read = 0
        self.lock = threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self.lock:
            self.read += 1
        return bytes(1 << 20)


def test_a_client_that_takes_nothing_is_dropped_and_holds_no_thread_meanwhile() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=1.0)
    pieces = CountedPieces()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await StreamedAnswer(iter(pieces), slots, headers={}, media_type=ARROW)(scope, receive, send)

    with serving(app) as url, httpx.stream("GET", url):
        until(lambda: pieces.read > 2)
        # The one thread is free, though the answer is still under way.
        assert slots.pool.submit(lambda: 7).result(timeout=5) == 7
        assert slots.in_use == 1
        until(lambda: slots.in_use == 0)
        assert pieces.read < 50


def test_a_client_that_leaves_stops_the_reading() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=60.0)
    pieces = CountedPieces()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await StreamedAnswer(iter(pieces), slots, headers={}, media_type=ARROW)(scope, receive, send)
            except BaseException as error:
                if type(error).__name__ != "ClientDisconnect":
                    raise

    with serving(app) as url:
        with httpx.stream("GET", url):
            until(lambda: pieces.read > 2)
        until(lambda: slots.in_use == 0)
        read = pieces.read
        time.sleep(0.2)
        assert pieces.read == read


async def test_more_streams_than_there_are_places_are_turned_away() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=60.0)
    slots.take()
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    answer = StreamedAnswer(iter([b"x"]), slots, headers={}, media_type=ARROW)
    with pytest.raises(Exception, match="max_streams"):
        await answer({"type": "http", "method": "GET"}, receive, send)
    assert sent == []
    slots.in_use -= 1
    await answer({"type": "http", "method": "GET"}, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"x"
    assert slots.in_use == 0


def test_a_misspelt_query_parameter_is_refused_by_name(url: str) -> None:
    reply = httpx.get(f"{url}/v1/corpora/docs/targets/fake", params={"start": 0, "stop": 10, "feilds": "top_k"})
    detail = refused(reply, 422, "invalid_input")
    assert "'feilds'" in detail
    assert "fields, k, start, stop" in detail
