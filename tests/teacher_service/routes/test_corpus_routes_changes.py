"""Corpora that change, or are damaged, below a running service; and etags, which tell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.upkeep.delete import plan_corpus, plan_shards, plan_teacher, remove
from tests.support import http
from tests.support.corpora import plan_targets, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import commit, filled_cache
from tests.support.processes.servers import hosted, refused, serving_corpora, serving_teachers, targets_of
from tests.support.waiting import until

ARROW = "application/vnd.apache.arrow.stream"
FIELDS = Fields(k=8, entropy=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Only read."""
    return filled_cache(tmp_path_factory.mktemp("filled") / "cache", FIELDS, missing=2)


@pytest.fixture
def own(filled: Cache, tmp_path: Path) -> Cache:
    """A copy that a test may change."""
    shutil.copytree(filled.root.url, tmp_path / "cache")
    return Cache.open(tmp_path / "cache", "r+")


@pytest.fixture
def own_url(own: Cache) -> Iterator[str]:
    with serving_corpora(own) as address:
        yield address


def test_an_etag_names_the_content_and_saves_its_reading(own_url: str, own: Cache) -> None:
    address, params = f"{own_url}/v1/corpora/docs/targets/fake", {"start": "0", "stop": "100"}
    first = http.get(address, params=params)
    etag = first.headers["etag"]
    assert etag.startswith('"')
    assert first.headers["cache-control"] == "private, immutable"
    for held in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        again = http.get(address, params=params, headers={"if-none-match": held})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert http.get(address, params=params, headers={"if-none-match": '"other"'}).status_code == 200
    head = http.head(address, params=params)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", etag)
    assert head.headers["content-type"] == ARROW
    others: list[dict[str, Any]] = [{"stop": 101}, {"k": 4}, {"fields": "top_k"}, {"start": 1}]
    found = [http.head(address, params={**params, **other}).headers["etag"] for other in others]
    as_json = http.head(address, params={**params, "stop": 50}, headers={"accept": "application/json"})
    found += [as_json.headers["etag"], http.head(address, params={**params, "stop": 50}).headers["etag"]]
    assert len({etag, *found}) == len(found) + 1
    # The objects' hashes are in the commits: what is there need not be read, and is not.
    shutil.rmtree(next((Path(own.root.url) / "targets/fake/docs/segments").glob("000000-*")))
    assert http.head(address, params=params).headers["etag"] == etag


def test_an_etag_outlives_the_service_and_changes_with_a_shard(own: Cache) -> None:
    def etags() -> tuple[str, str]:
        with serving_teachers(hosted("other", FakeTeacher()), cache=own) as url:
            starts = own.corpus("docs").shard_starts.tolist()
            first, second = (
                http.head(f"{url}/v1/corpora/docs/targets/fake", params={"start": a, "stop": b})
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


@pytest.mark.parametrize("what", ["corpus", "targets"])
def test_what_was_deleted_stays_gone(own: Cache, own_url: str, what: str) -> None:
    first = targets_of(own_url, start=0, stop=10)
    assert first.status_code == 200
    plans = plan_corpus(own.root, "docs") if what == "corpus" else plan_teacher(own.root, "fake", "docs")
    for removal in plans:
        remove(own.root, removal)
    until(lambda: targets_of(own_url).status_code == 404)
    held = {"if-none-match": first.headers["etag"]}
    for _ in range(4):
        assert targets_of(own_url).status_code == 404
        again = http.get(f"{own_url}/v1/corpora/docs/targets/fake", params={"start": 0, "stop": 10}, headers=held)
        assert again.status_code == 404
        assert http.get(f"{own_url}/v1/corpora/docs").status_code == (404 if what == "corpus" else 200)
