"""One teacher's name, one identity in a cache root; the model's configuration is a part of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.cache import Cache, Fields
from potstill.cache.errors import SpecMismatch
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.targets.names import require_one_identity, stored_identities
from potstill.cache.types import CONFIG_SHA256, JSON, TeacherIdentity
from potstill.clients.doctor.examine import Patient, examine
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data.sources import open_sources
from potstill.teacher_service.engine.config_hash import config_sha256
from potstill.teacher_service.hosting.hosted_teacher import Keep
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import commit
from tests.support.findings import PROBING
from tests.support.processes.servers import hosted, serving_teachers

FIELDS = Fields(k=4)


def with_config(identity: TeacherIdentity, config: str) -> TeacherIdentity:
    return replace(identity, overrides={CONFIG_SHA256: config})


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Corpora `one` and `two`; the teacher `big` has targets for `one`."""
    cache, corpus = make_corpus(tmp_path / "c", name="one", texts=topics(2))
    make_corpus(tmp_path / "c", name="two", texts=topics(2, characters=300))
    teacher = teacher_for(corpus)
    commit(cache.plan_targets("big", "one", teacher.identity, fields=FIELDS), teacher, range(corpus.num_shards))
    return cache


def other_than(cache: Cache) -> FakeTeacher:
    return teacher_for(cache.corpus("one"), model="random")


def test_a_name_cannot_be_another_teachers_on_another_corpus(cache: Cache) -> None:
    other = other_than(cache)
    with pytest.raises(SpecMismatch, match=r"name 'big' is another teacher's .* corpus 'one' .*weights_sha256"):
        cache.plan_targets("big", "two", other.identity, fields=FIELDS)
    assert cache.teachers("two") == []
    cache.plan_targets("small", "two", other.identity, fields=FIELDS)
    cache.plan_targets("big", "two", teacher_for(cache.corpus("one")).identity, fields=FIELDS)


def test_damaged_targets_keep_no_name(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "c" / "targets" / "big" / "one" / "zarr.json").write_text("{}")
    assert stored_identities(cache.root, "big") == {}


def two_of_one_name(cache: Cache) -> None:
    """Two teachers under one name, as earlier versions let them be."""
    corpus, other = cache.corpus("two"), other_than(cache)
    commit(cache.plan_targets("other", "two", other.identity, fields=FIELDS), other, range(corpus.num_shards))
    folder = Path(cache.root.url) / "targets"
    (folder / "other" / "two").rename(folder / "big" / "two")
    record = folder / "big" / "two" / "zarr.json"
    from potstill.cache.store.record import group_metadata, read_group_metadata

    found = read_group_metadata(cache.root, "targets/big/two", "targets")
    assert found is not None
    kept = {key: found[key] for key in ("corpus", "identity", "fields", "encoding")}
    record.write_bytes(group_metadata("targets", {"teacher": "big", **kept}))


async def test_doctor_and_a_training_run_name_both_corpora_of_a_name_with_two_teachers(cache: Cache) -> None:
    two_of_one_name(cache)
    findings = await examine(Patient(url=None, api_key=None, cache=cache.root.url, teachers=()), PROBING)
    (told,) = [each for each in findings if each.check == "one name, one teacher"]
    assert (told.level, told.subject) == ("fail", "big")
    assert "one teacher on one, another on two: weights_sha256" in told.detail
    config = TrainConfig.of(
        {
            "data": {"cache": cache.root.url, "corpus": "one"},
            "student": {"config": "unused"},
            "teachers": [{"name": "big"}],
            "train": {"out": "unused", "steps": 1},
        }
    )
    with (
        pytest.raises(SpecMismatch, match="another teacher's in this cache, whose targets corpus 'two'"),
        open_sources(config.teachers, cache, cache.corpus("one")),
    ):
        pass


async def test_doctor_tells_of_a_teacher_whose_name_is_taken(cache: Cache) -> None:
    with serving_teachers(hosted("served", other_than(cache))) as url:
        patient = Patient(url=None, api_key=None, cache=cache.root.url, teachers=(("big", f"{url}#served"),))
        findings = await examine(patient, PROBING)
    assert [each.level for each in findings if each.check == "one name, one teacher"] == ["fail"]


async def test_a_service_does_not_start_a_teacher_whose_name_is_taken(cache: Cache) -> None:
    teacher = hosted("big", other_than(cache), Keep(cache, KeepPolicy(k=4)))
    teacher.start()
    with pytest.raises(SpecMismatch, match="'big' did not start: the name 'big' is another teacher's in this cache"):
        await teacher.settled()
    await teacher.stop()


def test_a_service_gives_no_targets_of_another_teacher_than_it_serves(cache: Cache) -> None:
    with (
        serving_teachers(hosted("big", other_than(cache)), cache=cache) as url,
        HttpCache(url) as remote,
        pytest.raises(SpecMismatch, match="not of the teacher that is served under this name.*weights_sha256"),
    ):
        remote.targets("big", "one")


def test_identities_without_a_config_hash_match_as_before(cache: Cache) -> None:
    before = cache.targets("big", "one").identity
    assert CONFIG_SHA256 not in before.overrides
    now, changed = with_config(before, "a" * 64), with_config(before, "b" * 64)
    assert before == now == before
    assert before == changed
    assert now != changed
    assert "config_sha256" in now.differences(changed)
    assert replace(now, overrides={**now.overrides, "x": 1}) != before
    require_one_identity(cache.root, "big", now)


CONFIG: Mapping[str, JSON] = {
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 10000.0,
    "text_config": {"layers": 2, "torch_dtype": "bfloat16"},
    "transformers_version": "4.40.0",
    "_name_or_path": "/home/somebody/model",
    "rope_scaling": None,
}


def hashed(config: Mapping[str, JSON]) -> str:
    return config_sha256(json.loads(json.dumps(config)))


def test_the_config_hash_is_of_what_changes_numbers() -> None:
    first = hashed(CONFIG)
    saved_again = {**CONFIG, "transformers_version": "5.0.0", "_name_or_path": "there", "rope_theta": 10000}
    del saved_again["rope_scaling"]
    saved_again["text_config"] = {"dtype": "float32", "layers": 2}
    assert hashed(dict(reversed(saved_again.items()))) == first
    assert hashed({**CONFIG, "rope_theta": 500_000.0}) != first
    assert hashed({**CONFIG, "text_config": {"layers": 3}}) != first
    assert hashed({**CONFIG, "unheard_of": 1}) != first


async def test_a_journal_of_another_teacher_of_the_name_is_told_of(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    row = cache.corpus("one").row(0)
    for model in ("first", "second"):
        teacher = teacher_for(cache.corpus("one"), model=model)
        async with CachedTeacher.open(teacher, name="asked", cache=cache, policy=KeepPolicy(k=4)) as cached:
            await cached.score([row], Fields(k=4))
        assert ("rows of another asked (weights_sha256" in caplog.text) == (model == "second")
    with serving_teachers(hosted("served", teacher)) as url:
        patient = Patient(url=None, api_key=None, cache=cache.root.url, teachers=(("asked", f"{url}#served"),))
        findings = await examine(patient, PROBING)
    assert [each.level for each in findings if each.check == "one name, one teacher"] == ["warn"]
