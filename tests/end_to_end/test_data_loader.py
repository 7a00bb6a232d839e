"""Opened corpora and targets in the workers of PyTorch's `DataLoader`, forked or spawned."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from potstill.cache import Cache, Fields
from potstill.cache.corpus import Corpus
from potstill.cache.errors import InvalidInput
from potstill.cache.store import Root
from potstill.cache.targets.target_set import TargetSet
from potstill.clients.http_targets import HttpCache
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.sources import cache_source
from tests.support.corpora import teacher_for
from tests.support.filled_caches import filled_cache
from tests.support.processes.s3 import s3_server
from tests.support.processes.servers import hosted, serving_teachers

FIELDS = Fields(k=4, entropy=True)
# Python 3.12 warns of every fork of a process with threads; that is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Rows:
    """A map-style dataset as people write it: row `i` of each corpus, with its targets."""

    def __init__(self, opened: dict[str, tuple[Corpus, TargetSet]]) -> None:
        self.opened = opened

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Any]:
        def read(corpus: Corpus, targets: TargetSet) -> list[Any]:
            (found,) = targets.read_rows([row])
            return [corpus.row(row).tolist(), found.ids.tolist(), found.logprobs.tolist(), targets.committed.tolist()]

        return {name: read(*each) for name, each in self.opened.items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One cache, opened in a folder, behind a service, and in an object store."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        folder = filled_cache(tmp_path_factory.mktemp("loaded") / "cache", FIELDS)
        url = stack.enter_context(serving_teachers(hosted("fake", teacher_for(folder.corpus("docs"))), cache=folder))
        server = stack.enter_context(s3_server())
        for name, value in server.environment().items():
            patch.setenv(name, value)
        stored = Root.open(server.new_bucket(), create=True)
        for path in folder.root.sizes(""):
            stored.create(path, folder.root.get(path) or b"")
        remote = stack.enter_context(HttpCache(url))
        yield {"folder": Cache.open(folder.root.url), "http": remote, "s3": Cache.open(stored.url)}


def opened(cache: Any) -> tuple[Any, Any]:
    return cache.corpus("docs"), cache.targets("fake", "docs")


def loaded(rows: Rows) -> list[dict[str, Any]]:
    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=120,
    )
    return list(loader)


def test_a_forked_worker_reads_what_its_parent_opened_and_used(places: dict[str, Any]) -> None:
    rows = Rows({name: opened(places[name]) for name in ("folder", "http")})
    here = [rows[index] for index in range(len(rows))]
    assert here[0]["folder"] == here[0]["http"]
    assert loaded(rows) == here


def test_a_reader_of_batches_travels_to_workers(places: dict[str, Any]) -> None:
    for name in ("folder", "s3"):
        corpus, targets = opened(places[name])
        reader = BatchReader(corpus, sources=(cache_source("fake", targets),), weights=(1.0,))
        expected = reader.read([2, 5])
        assert torch.equal(pickle.loads(pickle.dumps(reader)).read([2, 5]).tokens, expected.tokens)


def test_a_forked_child_is_told_that_it_cannot_use_the_object_store_of_its_parent(places: dict[str, Any]) -> None:
    corpus, targets = opened(places["s3"])
    targets.read(0, 10)

    def is_told() -> bool:
        for use in (lambda: targets.read(0, 10), lambda: corpus.row(0), lambda: Cache.open(corpus._root.url)):
            with pytest.raises(InvalidInput, match="s3://.*forked process.*multiprocessing_context='spawn'"):
                use()
        return True

    assert _forked(is_told) == 0


def test_what_travels_to_a_spawned_worker_is_an_address_that_is_opened_again(places: dict[str, Any]) -> None:
    # All that a spawned `DataLoader` does besides, which takes seconds, is to import torch.
    for place, cache in places.items():
        rows = Rows({place: opened(cache)})
        sent = pickle.dumps((cache, rows))
        assert len(sent) < 5000
        again, there = pickle.loads(sent)
        assert there[3] == rows[3]
        assert again.targets("fake", "docs").identity == rows.opened[place][1].identity
        if place == "http":
            again.close()


def test_what_lives_in_memory_cannot_travel() -> None:
    with pytest.raises(InvalidInput, match="memory"):
        pickle.dumps(Cache.open("memory://", "r+"))


def test_a_fork_while_other_threads_read_leaves_no_lock_behind(places: dict[str, Any]) -> None:
    corpus, targets = opened(places["folder"])
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            Cache.open(corpus._root.url, chunk_cache_bytes=1).targets("fake", "docs").read(0, 50)
            targets.read(0, 50)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    expected = targets.read(0, 50)
    children = [_forked(lambda: np.array_equal(targets.read(0, 50).ids, expected.ids)) for _ in range(10)]
    done.set()
    for thread in threads:
        thread.join()
    assert children == [0] * 10


def test_a_forked_child_scores_by_a_teacher_of_its_parent(places: dict[str, Any]) -> None:
    with SyncHttpTeacher(places["http"]._connection.url, "fake", timeout=60) as teacher:
        row = np.arange(5, dtype=np.uint32)
        (expected,) = teacher.score([row], Fields(k=2))
        assert _forked(lambda: np.array_equal(teacher.score([row], Fields(k=2))[0].ids, expected.ids)) == 0


def _forked(work: Any) -> int:
    """Exit status of a forked child: 0 if `work` gives true there."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:  # noqa: BLE001 -- a child must never go on with the tests
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
