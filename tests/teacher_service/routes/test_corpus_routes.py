from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.wire import scores as wire
from potstill.cache.wire.scores import END
from potstill.teacher_service.routes.corpora.reads import RangeRead
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import filled_cache
from tests.support.processes.servers import hosted, refused, serving_corpora, serving_teachers, targets_of

ARROW = "application/vnd.apache.arrow.stream"
TOP_K = ("ids", "logprobs", "log_tail", "label_logprob")
FIELDS = Fields(k=8, entropy=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Only read."""
    return filled_cache(tmp_path_factory.mktemp("filled") / "cache", FIELDS, missing=2)


@pytest.fixture(scope="module")
def url(filled: Cache) -> Iterator[str]:
    with serving_corpora(filled) as address:
        yield address


def test_corpora_are_described(url: str, filled: Cache) -> None:
    corpus = filled.corpus("docs")
    counts = {
        "name": "docs",
        "rows": len(corpus),
        "positions": corpus.num_positions,
        "shards": corpus.num_shards,
        "tokenizer_sha256": corpus.tokenizer_sha256,
    }
    described = http.get(f"{url}/v1/corpora").json()
    listed = [{**counts, "teachers": ["fake"]}]
    assert described == {"format": wire.WIRE_VERSION, "corpora": listed, "unreadable": []}
    one = http.get(f"{url}/v1/corpora/docs").json()
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
    monkeypatch.setattr("potstill.teacher_service.routes.corpora.reads.BLOCK_BYTES", 64 * 100)  # 64 positions
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
        return http.get(address, params={"start": 0, "stop": stop}, headers={"accept": "application/json"})

    answer = get(50).json()
    assert answer["format"] == wire.WIRE_VERSION
    assert answer["rows"][0]["ids"] == filled.targets("fake", "docs").read(0, 50).ids.tolist()
    assert "max_range_positions=50" in refused(get(51), 422, "limit_exceeded")
    assert targets_of(url, start=0, stop=51).status_code == 200


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
        refused(http.get(f"{url}/v1/corpora/{path}", params={"start": 0, "stop": 1}), 404, kind)
    for name in ("..", "%2e%2e", "a%2Fb", "x" * 300, "%00"):
        for path in (f"{name}/targets/fake", f"docs/targets/{name}", f"{name}/tokens", f"docs/annotations/{name}"):
            reply = http.get(f"{url}/v1/corpora/{path}", params={"start": 0, "stop": 1})
            # A path with `..` is that of another route: the client, or the server, takes it so.
            assert reply.status_code in (404, 422) or name == "..", (path, reply.text)


def test_rows_are_asked_for_by_number_as_json_or_arrow(url: str, filled: Cache) -> None:
    address = f"{url}/v1/corpora/docs/targets/fake/rows"
    kept = filled.targets("fake", "docs")
    reply = http.post(address, json={"rows": [5, 0, 5], "fields": ["top_k"], "k": 2})
    with pa.ipc.open_stream(reply.content) as reader:
        batches = list(reader)
    for batch, expected in zip(batches, kept.read_rows([5, 0, 5], k=2, fields=Fields(k=8)), strict=True):
        np.testing.assert_array_equal(batch.column("ids").flatten().to_numpy().reshape(-1, 2), expected.ids)
    answer = http.post(address, json={"rows": [0]}, headers={"accept": "application/json"}).json()
    assert answer["rows"][0]["ids"] == kept.read_rows([0])[0].ids.tolist()
    assert "max_rows=20" in refused(http.post(address, json={"rows": list(range(21))}), 422, "limit_exceeded")
    refused(http.post(address, content=b"x", headers={"content-type": "text/plain"}), 415, "media_type")
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
        refused(http.post(address, json=body), 422, "invalid_input")
    refused(http.post(address, content=b"x", headers={"content-type": ARROW}), 422, "invalid_input")
    refused(http.post(address, json={"rows": [10_000]}), 422, "invalid_input")
    refused(http.post(address, json={"rows": [len(filled.corpus("docs")) - 1]}), 404, "not_committed")


def test_another_wire_version_is_refused_naming_both(url: str) -> None:
    newer = {"potstill-format": "2"}
    for path in ("", "/docs", "/docs/targets/fake", "/docs/tokens", "/docs/rows", "/docs/tokenizer"):
        detail = refused(http.get(f"{url}/v1/corpora{path}", headers=newer), 400, "wire_version")
        assert "'2'" in detail
        assert "'1'" in detail
    refused(http.put(f"{url}/v1/corpora/docs/fill/other", json={}, headers=newer), 400, "wire_version")
    metadata = {b"potstill.format": b"2"}
    schema = pa.schema([pa.field("rows", pa.int64())], metadata=metadata)
    batch = pa.record_batch([pa.array([0])], schema=schema)
    body = b"".join([schema.serialize(), batch.serialize(), END])
    for path in ("/docs/rows", "/docs/targets/fake/rows"):
        reply = http.post(f"{url}/v1/corpora{path}", content=body, headers={"content-type": ARROW})
        refused(reply, 400, "wire_version")


def test_every_body_says_which_wire_version_it_is(url: str) -> None:
    for path in ("", "/docs", "/docs/targets/fake"):
        assert http.get(f"{url}/v1/corpora{path}").json()["format"] == wire.WIRE_VERSION
    for path in ("tokens", "rows", "row_keys", "shard_rows", "shard_starts", "targets/fake?start=0&stop=1"):
        with pa.ipc.open_stream(io.BytesIO(http.get(f"{url}/v1/corpora/docs/{path}").content)) as reader:
            assert reader.schema.metadata[b"potstill.format"] == wire.WIRE_VERSION.encode()
    assert http.get(f"{url}/v1/corpora/docs/tokenizer").headers["potstill-format"] == wire.WIRE_VERSION


def test_without_a_cache_there_is_no_corpus() -> None:
    with serving_teachers(hosted("other", FakeTeacher())) as url:
        assert http.get(f"{url}/v1/corpora").json() == {"format": wire.WIRE_VERSION, "corpora": [], "unreadable": []}
        assert "--cache" in refused(targets_of(url, start=0, stop=1), 404, "unknown_corpus")


def test_a_misspelt_query_parameter_is_refused_by_name(url: str) -> None:
    reply = http.get(f"{url}/v1/corpora/docs/targets/fake", params={"start": 0, "stop": 10, "feilds": "top_k"})
    detail = refused(reply, 422, "invalid_input")
    assert "'feilds'" in detail
    assert "fields, k, start, stop" in detail
