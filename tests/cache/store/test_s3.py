"""The guarantees of a local folder, on a real S3 server, with faults in between."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.errors import CorruptSegment, InvalidInput, StoreError
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.store.claims import Claims
from potstill.cache.store.groups import GroupReader, GroupWriter
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.object_ranges import ObjectRanges
from potstill.cache.store.object_stores import PROBE
from potstill.cache.store.root import Root
from potstill.cache.upkeep.garbage import find_garbage, remove_garbage
from tests.support.corpora import byte_tokenizer, make_corpus, plan_targets, teacher_for, topics, write_texts
from tests.support.processes.faulty_proxy import FAULTS, Fault, FaultyProxy, faulty_proxy, no_faults, random_faults
from tests.support.processes.fill_job import assert_whole, begin_together, fill_job, report_of, segment_bytes, step_of
from tests.support.processes.s3 import PAGE, S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, reached directly."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server.new_bucket()


@pytest.fixture
def faulty_url(url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A root reached through the proxy, which injects nothing until it is told to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield url
    proxy.choose, proxy.drop_header = no_faults, ""


def once(fault: Fault, method: str = "") -> Callable[[str, str], Fault | None]:
    """The next request of the method meets the fault, later ones do not."""
    left = [fault]

    def choose(asked: str, _target: str) -> Fault | None:
        return left.pop() if left and asked.startswith(method) else None

    return choose


def corpus_at(url: str, folder: Path, count: int = 8) -> tuple[Cache, Corpus]:
    cache = Cache.open(url, mode="r+")
    source = write_texts(folder / "text", topics(count))
    plan = IngestPlan(row_tokens=50, shard_positions=1000)
    return cache, ingest(cache.root, "docs", [source], byte_tokenizer(), plan)


def test_an_object_that_ends_before_one_of_the_chunks_that_adjoin_is_damage(url: str) -> None:
    root = Root.open(url, create=True)
    assert root.create("chunks", bytes(range(250)) * 2)
    objects = ObjectRanges(root.store)
    assert [part.tolist() for part in objects.read("chunks", [(3, 5), (0, 2), (2, 3)])] == [[3, 4], [0, 1], [2]]
    with pytest.raises(CorruptSegment, match="chunks is cut short"):
        objects.read("chunks", [(0, 400), (400, 700), (700, 900)])


def test_create_listing_over_a_page_and_delete_are_as_on_a_local_root(url: str) -> None:
    root = Root.open(url, create=True)
    assert root.create("commits/0.json", b"one")
    assert root.create("commits/0.json", b"one")
    assert not root.create("commits/0.json", b"two")
    assert root.get("commits/0.json") == b"one"
    assert root.get("commits/1.json") is None
    many = 2 * PAGE + 10
    for index in range(many):
        root.create(f"many/{index:04d}", b"x")
    assert len(root.objects("many")) == len(root.sizes("many")) == many
    assert root.folders("") == ["commits", "many"]
    age = root.seconds_since_write("many")
    assert age is not None
    assert -2 < age < 120
    root.delete("many")
    root.delete("many")
    assert root.sizes("many") == {}
    root.remove("many/0000")
    assert Root.open(url).get("commits/0.json") == b"one"


def test_what_keeps_a_bucket_from_being_a_cache_is_one_line_each(server: S3Server, url: str) -> None:
    with pytest.raises(StoreError, match="the bucket does not exist; create it or mend the URL$"):
        Root.open("s3://no-such-bucket/x")
    root = Root.open(url, create=True)
    server.require_credentials(required=True)
    try:
        denied = r"access is denied \(InvalidAccessKeyId\); check the credentials in the environment and the bucket"
        with pytest.raises(StoreError, match=denied):
            Root.open(url)
        with pytest.raises(StoreError, match=denied):
            root.create("a", b"")
        with pytest.raises(StoreError, match=denied):
            root.get("a")
    finally:
        server.require_credentials(required=False)


def test_a_bucket_that_goes_away_is_an_error_and_not_an_empty_cache(url: str, server: S3Server) -> None:
    root = Root.open(url, create=True)
    root.remove(PROBE)
    server.delete_bucket(url)
    with pytest.raises(StoreError, match="the bucket does not exist"):
        root.get("corpora/docs/zarr.json")


def test_a_store_that_ignores_conditional_puts_is_refused_to_write(faulty_url: str, proxy: FaultyProxy) -> None:
    proxy.drop_header = "if-none-match"
    with pytest.raises(InvalidInput, match="ignores If-None-Match, so two writers would overwrite each other"):
        Root.open(faulty_url, create=True)
    Root.open(faulty_url)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_survives_one_fault(faulty_url: str, proxy: FaultyProxy, fault: Fault) -> None:
    root = Root.open(faulty_url, create=True)
    met = proxy.met[fault]
    proxy.choose = once(fault, "PUT")
    assert root.create("a/1", b"mine")
    proxy.choose = once(fault, "PUT")
    assert not root.create("a/1", b"another's")
    for call, expected in (
        (lambda: root.get("a/1"), b"mine"),
        (lambda: root.get("a/2"), None),
        (lambda: root.sizes("a"), {"1": 4}),
        (lambda: root.objects("a"), ["1"]),
        (lambda: root.sha256("a/1"), hashlib.sha256(b"mine").hexdigest()),
        (lambda: root.delete("a"), None),
        (lambda: root.remove("a/1"), None),
    ):
        proxy.choose = once(fault)
        assert call() == expected
    assert proxy.met[fault] == met + 9
    proxy.choose = no_faults
    assert root.sizes("a") == {}


def test_a_create_whose_answer_is_lost_knows_whose_object_is_there(faulty_url: str, proxy: FaultyProxy) -> None:
    root = Root.open(faulty_url, create=True)
    for fault in ("drop after", "truncate"):
        proxy.choose = once(fault, "PUT")
        assert root.create(f"commits/{fault}", b"ours")
        proxy.choose = once(fault, "PUT")
        assert not root.create(f"commits/{fault}", b"another's")


@pytest.mark.parametrize("fault", ["500", "503", "drop before", "drop after", "delay"])
def test_large_objects_in_parts_survive_a_fault_of_every_request(
    faulty_url: str, proxy: FaultyProxy, fault: Fault
) -> None:
    root = Root.open(faulty_url, create=True)
    seen: set[tuple[str, str]] = set()

    def first_of_each_kind(method: str, target: str) -> Fault | None:
        kind = method, target.partition("?")[2].split("=")[0]
        if kind in seen or not target.partition("?")[2]:
            return None
        seen.add(kind)
        return fault

    data = np.random.default_rng(0).integers(0, 256, 6 << 20, dtype=np.uint8)
    proxy.choose = first_of_each_kind
    writer = GroupWriter(root, "group")
    writer.write("noise", data, Layout((1 << 20,)))
    objects = writer.finish()
    proxy.choose = no_faults
    assert {("POST", "uploads"), ("PUT", "partNumber"), ("POST", "uploadId")} <= seen, "it went up in parts"
    reader = GroupReader(root, "group", objects)
    assert reader.corrupt_objects() == []
    assert np.array_equal(reader.read_all("noise"), data)


def test_a_fill_through_random_faults_ends_with_the_bytes_of_an_undisturbed_one(
    faulty_url: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    undisturbed, local = make_corpus(tmp_path / "local")
    teacher = teacher_for(local)
    asyncio.run(fill(teacher, plan_targets(undisturbed, teacher), FillPlan(batch_tokens=500)))
    cache, corpus = corpus_at(faulty_url, tmp_path)
    assert corpus.fingerprint == local.fingerprint
    proxy.choose = random_faults(3, 0.05)
    before = proxy.met.total()
    report = asyncio.run(fill(teacher, plan_targets(cache, teacher), FillPlan(batch_tokens=500)))
    proxy.choose = no_faults
    assert proxy.met.total() > before + 5
    assert report.shards_committed + report.shards_lost == corpus.num_shards
    assert segment_bytes(Cache.open(faulty_url)) == segment_bytes(undisturbed)
    for garbage in find_garbage(cache.root, min_age_seconds=-5):
        remove_garbage(cache.root, garbage)
    assert_whole(cache)


def test_jobs_on_s3_share_the_work_and_take_over_what_killed_and_stalled_ones_held(url: str, tmp_path: Path) -> None:
    undisturbed, local = make_corpus(tmp_path / "local", texts=topics(12))
    teacher = teacher_for(local)
    asyncio.run(fill(teacher, plan_targets(undisturbed, teacher), FillPlan(batch_tokens=500)))
    cache, corpus = corpus_at(url, tmp_path, 12)
    slow = ("--tokens-per-second", 2000, "--claim-seconds", 1, "--told")
    with fill_job(url, *slow) as killed, fill_job(url, *slow) as stalled:
        begin_together(killed, stalled)
        for job in (killed, stalled):
            while step_of(job)["shards_committed"] < 1:
                pass
        killed.send_signal(signal.SIGKILL)
        stalled.send_signal(signal.SIGSTOP)
        with fill_job(url, "--claim-seconds", 1) as last:
            report_of(last)
        final = segment_bytes(cache)
        stalled.send_signal(signal.SIGCONT)
        late = report_of(stalled)
    assert late["shards_committed"] + late["shards_elsewhere"] == corpus.num_shards
    assert segment_bytes(cache) == final == segment_bytes(undisturbed)
    for garbage in find_garbage(cache.root, min_age_seconds=-5):
        remove_garbage(cache.root, garbage)
    assert_whole(cache)


def test_claims_hold_expire_and_are_taken_over_on_s3(url: str) -> None:
    root = Root.open(url, create=True)
    owner, other = (Claims(root, "targets/t/c/claims", ttl=0.5) for _ in range(2))
    claim = owner.take("000000")
    assert claim is not None
    assert other.busy() == {"000000"}
    assert other.take("000000") is None
    while other.busy():
        time.sleep(0.05)
    taken = other.take("000000")
    assert taken is not None
    assert not claim.still_mine()
    claim.release()
    taken.release()
    assert root.objects("targets/t/c/claims") == []
