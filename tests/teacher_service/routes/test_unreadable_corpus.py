"""A damaged corpus does not hide the others, and one that was deleted meanwhile is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.errors import StoreError
from potstill.cache.store.groups import Reading
from potstill.cache.store.root import Root
from potstill.clients.doctor.cache_checks import unreadable_finding
from potstill.teacher_service.hosting.coverage import read_coverage
from tests.support import http
from tests.support.command_line import run
from tests.support.corpora import make_corpus
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers


class Denied(Root):
    """Gives everything but the record of one corpus."""

    def get(self, path: str) -> bytes | None:
        if path == "corpora/bad/zarr.json":
            raise StoreError(f"{path}: permission denied")
        return super().get(path)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Of the corpora `bad`, which cannot be read, and `good`; of `gone` a deletion left something."""
    for name in ("bad", "good"):
        make_corpus(tmp_path / "cache", name=name)
    (tmp_path / "cache" / "corpora" / "bad" / "zarr.json").write_text("{")
    (tmp_path / "cache" / "corpora" / "gone").mkdir()
    (tmp_path / "cache" / "corpora" / "gone" / "left").write_text("x")
    return Cache.open(tmp_path / "cache", mode="r+")


@pytest.fixture
def url(cache: Cache) -> Iterator[str]:
    with serving_teachers(hosted("smol", FakeTeacher()), cache=cache) as address:
        yield address


def test_the_list_of_corpora_names_it_apart(url: str) -> None:
    found = http.get(f"{url}/v1/corpora").json()
    assert [corpus["name"] for corpus in found["corpora"]] == ["good"]
    [bad] = found["unreadable"]
    assert bad["name"] == "bad"
    assert "corpora/bad/zarr.json is not JSON" in bad["detail"]


def test_the_doctor_tells_it_and_goes_on(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = http.get(f"{url}/v1/doctor").json()["store"]
    assert [corpus["name"] for corpus in store["corpora"]] == ["good"]
    assert [corpus["name"] for corpus in store["unreadable"]] == ["bad"]
    assert run("doctor", "--url", url, "--json") == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    [bad] = [finding for finding in findings if finding["check"] == "corpus"]
    assert bad["subject"] == f"bad of {url}"
    assert "corpora/bad/zarr.json is not JSON" in bad["detail"]
    assert "potstill verify" in bad["way_out"]
    assert [finding["subject"] for finding in findings if finding["check"] == "tokenizer"] == ["smol on good"]


def test_the_doctor_tells_it_of_a_cache_without_a_service(
    cache: Cache, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--cache", cache.root.url, "--teacher", f"smol={url}#smol", "--json") == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    [bad] = [finding for finding in findings if finding["check"] == "corpus"]
    assert bad["subject"] == f"bad of {cache.root.url}"
    assert "corpora/bad/zarr.json is not JSON" in bad["detail"]
    assert [finding["subject"] for finding in findings if finding["check"] == "tokenizer"] == ["smol on good"]


def test_the_coverage_has_its_error_in_its_place(cache: Cache) -> None:
    bad, good = read_coverage(cache)
    assert (bad.corpus, bad.shards, bad.teachers) == ("bad", 0, ())
    assert "corpora/bad/zarr.json is not JSON" in bad.error
    assert (good.corpus, good.error) == ("good", "")
    assert good.shards > 0


def test_a_record_that_the_store_does_not_give_hides_no_others_and_is_not_called_damage(cache: Cache) -> None:
    denied = Cache(Denied.open(cache.root.url), "r", Reading.open(0))
    seen = denied.look_at_corpora(denied.corpus)
    assert list(seen.found) == ["good"]
    [(name, error)] = seen.unreadable.items()
    assert (name, error.kind) == ("bad", "store")
    found = unreadable_finding(name, "here", kind=error.kind, detail=error.detail)
    assert "rights" in found.way_out
