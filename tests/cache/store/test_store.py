from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from potstill.cache.errors import InvalidInput, StoreError
from potstill.cache.store.local_files import TEMPORARY
from potstill.cache.store.object_stores import explain, open_object_store
from potstill.cache.store.root import Root


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root.open("memory://" if request.param == "memory" else tmp_path)


def test_create_says_whether_what_is_there_is_its_own(root: Root) -> None:
    assert root.create("a/b/c.json", b"one")
    assert root.create("a/b/c.json", b"one"), "as after an answer that was lost"
    assert not root.create("a/b/c.json", b"two")
    assert root.get("a/b/c.json") == b"one"
    assert root.get("a/b/d.json") is None


def test_one_of_many_racing_creates_wins_and_its_bytes_are_read(root: Root) -> None:
    won: list[bytes] = []

    def race(index: int) -> None:
        if root.create("commits/0.json", b"%d" % index, durable=index % 2 == 0):
            won.append(b"%d" % index)

    threads = [threading.Thread(target=race, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [root.get("commits/0.json")]


def test_listings_name_what_is_directly_below_and_everything_below(root: Root) -> None:
    for path in ("t/a/x", "t/b/y/z", "t/one", "t/.hidden", "other"):
        root.create(path, path.encode())
    assert root.folders("t") == ["a", "b"]
    assert root.objects("t") == ["one"]
    assert root.sizes("t") == {"a/x": 5, "b/y/z": 7, "one": 5, ".hidden": 9}
    assert root.sizes("none") == {}
    assert root.objects("none") == root.folders("none") == []
    age = root.seconds_since_write("t")
    assert age is not None
    assert -2 < age < 60
    assert root.seconds_since_write("none") is None


def test_time_is_the_stores_own_and_goes_on_when_this_machines_clock_is_set(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.create("a", b"x")
    before = root.now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= root.now() - before < 60
    assert -2 < (root.seconds_since_write("a") or 0.0) < 60


def test_another_object_under_a_name_has_another_version(root: Root) -> None:
    root.create("claims/a", b"1")
    first = root.versions("claims")
    assert first == root.versions("claims")
    root.remove("claims/a")
    root.create("claims/a", b"22")
    assert root.versions("claims").keys() == first.keys()
    assert root.versions("claims") != first


def test_remove_and_delete_leave_nothing_and_do_not_mind_that_nothing_is_there(root: Root) -> None:
    for index in range(30):
        root.create(f"segments/s/{index}", b"x")
    root.create("segments/t", b"kept")
    root.remove("segments/s/3")
    root.remove("segments/s/3")
    assert len(root.sizes("segments/s")) == 29
    root.delete("segments/s")
    root.delete("segments/s")
    assert root.sizes("segments") == {"t": 4}
    assert root.folders("segments") == []


def test_delete_takes_what_an_interrupted_put_left(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    root.create("segments/s/a", b"x")
    # How obstore names a file before it is whole, which it does not list.
    (tmp_path / "segments" / "s" / "a#1").write_bytes(b"half")
    assert root.sizes("segments/s") == {"a": 1, "a#1": 4}
    root.delete("segments/s")
    assert not (tmp_path / "segments" / "s").exists()


def test_threads_that_delete_the_same_folder_all_succeed(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    for index in range(200):
        root.create(f"g/{index % 7}/{index}", b"x", durable=False)
    failed: list[StoreError] = []

    def delete() -> None:
        try:
            root.delete("g")
        except StoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=delete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert not (tmp_path / "g").exists()


def test_prune_removes_empty_folders_up_to_one_that_is_not(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    root.create("targets/t/c/claims/x", b"")
    root.create("targets/u", b"")
    root.prune("targets/t/c/claims")
    assert (tmp_path / "targets/t/c/claims").exists()
    root.remove("targets/t/c/claims/x")
    root.prune("targets/t/c/claims")
    assert sorted(path.name for path in (tmp_path / "targets").iterdir()) == ["u"]


def test_a_create_survives_that_its_folder_is_pruned_away_meanwhile(tmp_path: Path) -> None:
    root = Root.open(tmp_path)
    stop = threading.Event()

    def prune() -> None:
        while not stop.is_set():
            root.prune("claims/deep")

    pruner = threading.Thread(target=prune)
    pruner.start()
    try:
        for index in range(300):
            root.create(f"claims/deep/{index}", b"x", durable=False)
            root.remove(f"claims/deep/{index}")
    finally:
        stop.set()
        pruner.join()
    assert list((tmp_path / TEMPORARY).iterdir()) == []


def test_the_hash_of_an_object_is_of_all_its_blocks(root: Root) -> None:
    import hashlib

    data = bytes(range(256)) * ((40 << 20) // 256) + b"tail"
    root.create("big", data)
    assert root.sha256("big") == hashlib.sha256(data).hexdigest()
    root.create("empty", b"")
    assert root.sha256("empty") == hashlib.sha256(b"").hexdigest()


def test_a_file_url_is_the_folder_itself(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    root = Root.open(f"file://{tmp_path}/with%20a%20space", create=True)
    assert root.create("a", b"x")
    assert (folder / "a").read_bytes() == b"x"
    root.flush("a")


@pytest.mark.parametrize("url", ["ftp://host/x", "nothing://"])
def test_a_scheme_that_cannot_hold_a_cache_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"the scheme is not known; take a folder, file:// or s3://"):
        Root.open(url)


def test_a_service_is_no_folder_or_object_store() -> None:
    with pytest.raises(InvalidInput, match=r"services are read by clients and .*; give the folder or object store"):
        Root.open("http://host:8700")


@pytest.mark.parametrize(
    ("url", "words"),
    [("file://mycache", "names no folder"), ("file://", "names no folder"), ("s3://[bad", "cannot open 's3://")],
)
def test_a_url_that_means_nothing_is_no_other_folder(url: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Root.open(url, create=True)


def test_a_folder_that_is_not_there_is_made_only_to_write(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the folder does not exist"):
        Root.open(tmp_path / "none")
    Root.open(tmp_path / "none", create=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="free space or mend access"):
        Root.open(tmp_path / "file" / "below", create=True)


def s3_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str, **more: str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name, value in more.items():
        monkeypatch.setenv(name, value)


def test_a_store_that_nobody_answers_for_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_environment(monkeypatch, "http://127.0.0.1:9", AWS_ALLOW_HTTP="true")
    began = time.monotonic()
    with pytest.raises(StoreError, match="the store does not answer; check the network and AWS_ENDPOINT_URL"):
        Root.open("s3://bucket/x")
    assert time.monotonic() - began < 60


def test_plain_http_has_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_environment(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    with pytest.raises(StoreError, match="set AWS_ALLOW_HTTP=true"):
        open_object_store("s3://bucket/x", write=False)


def test_an_error_of_many_lines_is_explained_in_one() -> None:
    error = OSError("Server said: <Code>EntityTooLarge</Code>\n\nDebug source:\nGeneric {\n}")
    assert explain(error) == "EntityTooLarge; free space or mend access, then run it again"
