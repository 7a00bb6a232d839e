"""Teachers whose tokenizer differs from the corpus's in ids that no row uses, and in ids that rows use."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from potstill.cache import Cache, Fields
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.errors import FormatError, SpecMismatch
from potstill.cache.targets.unshared_ids import UnsharedIds
from potstill.cache.types import TeacherIdentity
from potstill.clients.doctor.cache_checks import CorpusFacts, vocabulary_findings
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data.sources import open_cache, open_sources
from tests.support.command_line import run
from tests.support.corpora import VOCAB, byte_tokenizer
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.filled_caches import commit
from tests.support.processes.servers import hosted, serving_teachers

TEXT_IDS = [40, 41, 42, 43]


def sibling(*added: str, special: bool = True) -> Tokenizer:
    """The byte tokenizer with more tokens, from id 256 on."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=special) for text in added])
    return tokenizer


def corpus_of(root: Path, *rows: list[int], tokenizer: Tokenizer | None = None) -> tuple[Cache, Corpus]:
    cache = Cache.open(root, mode="r+")
    ids = [np.array(row, np.uint32) for row in rows or (TEXT_IDS, TEXT_IDS[::-1])]
    return cache, ingest_rows(cache.root, "docs", ids, tokenizer or sibling("<image>"), IngestPlan())


def identity_of(tokenizer: Tokenizer, vocab_size: int = VOCAB + 8) -> TeacherIdentity:
    return fake_identity(vocab_size=vocab_size, tokenizer_sha256=fingerprint(tokenizer))


def test_ranges_hold_what_they_were_made_of() -> None:
    ids = np.array([3, 4, 5, 9, 256], np.int64)
    made = UnsharedIds.of(ids)
    assert made.ranges == ((3, 6), (9, 10), (256, 257))
    assert made.text == "5 ids (3 to 5, 9, 256)"
    assert len(made) == 5
    assert [i for i in range(300) if i in made] == ids.tolist()
    every = np.arange(300, dtype=np.uint32).reshape(3, 100)
    np.testing.assert_array_equal(every[made.holds(every)], ids)
    assert UnsharedIds.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert not UnsharedIds.of(ids[:0])
    assert not UnsharedIds.from_json(None)
    assert not UnsharedIds().holds(every).any()


@pytest.mark.parametrize(
    "value", [3, [3], [[1, 2, 3]], [[2, 2]], [[1, 5], [5, 6]], [[-1, 3]], [["a", "b"]], [[0, 1.5]]]
)
def test_ranges_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(FormatError, match="unshared_ids is "):
        UnsharedIds.from_json(value)


def test_ids_that_no_row_uses_may_differ_and_are_recorded(tmp_path: Path) -> None:
    cache, corpus = corpus_of(tmp_path / "c")
    theirs = sibling("<audio>", "<more>")
    teacher = FakeTeacher(identity_of(theirs))
    with pytest.raises(SpecMismatch, match=r"ingest the text again .*, or `potstill prefill` with the model's folder"):
        cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=4))
    planned = cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=4), tokenizer=theirs)
    commit(planned, teacher, range(corpus.num_shards))
    opened = Cache.open(tmp_path / "c").targets("t", "docs")
    assert opened.identity.tokenizer_sha256 == fingerprint(theirs) != corpus.tokenizer_sha256
    assert opened.unshared.ranges == ((256, 258),)
    record = json.loads((tmp_path / "c" / "targets" / "t" / "docs" / "zarr.json").read_text())
    assert record["attributes"]["potstill"]["unshared_ids"] == [[256, 258]]
    # What is recorded is known to those who have only the fingerprint, as a service has of a teacher's.
    later = cache.fresh().plan_targets("t", "docs", teacher.identity, fields=Fields(k=4, entropy=True))
    assert later.unshared == opened.unshared


def test_the_same_tokenizer_has_none_and_its_record_is_as_ever(tmp_path: Path) -> None:
    cache, corpus = corpus_of(tmp_path / "c")
    teacher = FakeTeacher(identity_of(sibling("<image>")))
    commit(cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=4)), teacher, range(corpus.num_shards))
    assert not cache.targets("t", "docs").unshared
    assert "unshared_ids" not in (tmp_path / "c" / "targets" / "t" / "docs" / "zarr.json").read_text()


def test_ids_that_rows_use_are_named_with_both_tokens(tmp_path: Path) -> None:
    cache, _ = corpus_of(tmp_path / "c", [40, 256, 41, 256], tokenizer=sibling("<image>", "<b>"))
    theirs = sibling("<audio>", "<b>")
    with pytest.raises(SpecMismatch) as refusal:
        cache.plan_targets("t", "docs", identity_of(theirs), fields=Fields(k=4), tokenizer=theirs)
    assert refusal.value.detail == (
        "1 id of corpus 'docs' mean other tokens to teacher 't': id 256 (in 2 positions) is special '<image>', to the "
        "teacher special '<audio>'; ingest the text again with the teacher's tokenizer"
    )
    assert cache.teachers("docs") == []


def test_a_token_that_is_special_to_one_only_is_another(tmp_path: Path) -> None:
    cache, _ = corpus_of(tmp_path / "c", [40, 256])
    theirs = byte_tokenizer()
    theirs.add_tokens([AddedToken("<image>", special=False)])
    with pytest.raises(SpecMismatch, match=r"id 256 \(in 1 position\) is special '<image>', to the teacher '<image>'"):
        cache.plan_targets("t", "docs", identity_of(theirs), fields=Fields(k=4), tokenizer=theirs)


def test_a_token_that_the_teacher_lacks_and_a_prefix_of_another_are_refused(tmp_path: Path) -> None:
    cache, _ = corpus_of(tmp_path / "c", [40, 256])
    theirs = byte_tokenizer()
    with pytest.raises(SpecMismatch, match=r"is special '<image>', to the teacher nothing"):
        cache.plan_targets("t", "docs", identity_of(theirs), fields=Fields(k=4), tokenizer=theirs)
    cache, _ = corpus_of(tmp_path / "d")
    theirs = sibling("<audio>")
    prefixed = replace(identity_of(theirs), prefix_ids=(256,))
    with pytest.raises(SpecMismatch, match=r"id 256 \(in the teacher's prefix\) is special '<image>'"):
        cache.plan_targets("t", "docs", prefixed, fields=Fields(k=4), tokenizer=theirs)


def test_inspect_and_a_service_tell_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, corpus = corpus_of(tmp_path / "c")
    theirs = sibling("<audio>")
    teacher = FakeTeacher(identity_of(theirs))
    planned = cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=4), tokenizer=theirs)
    commit(planned, teacher, range(corpus.num_shards))
    assert run("inspect", tmp_path / "c") == 0
    assert "t on docs: the tokenizer differs in 1 id (256) that no row uses" in capsys.readouterr().out
    assert run("inspect", tmp_path / "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["targets"]["t"]["docs"]["unshared_ids"] == [[256, 257]]
    with serving_teachers(hosted("t", teacher), cache=cache.fresh()) as url, HttpCache(url) as there:
        assert there.targets("t", "docs").unshared == planned.unshared


def test_doctor_knows_them(tmp_path: Path) -> None:
    cache, corpus = corpus_of(tmp_path / "c")
    theirs = sibling("<audio>")
    teacher = FakeTeacher(identity_of(theirs))
    planned = cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=4), tokenizer=theirs)
    assert vocabulary_findings("t", teacher.identity, [CorpusFacts.of(cache, "docs")])[0].level == "fail"
    commit(planned, teacher, range(corpus.num_shards))
    [found] = vocabulary_findings("t", teacher.identity, [CorpusFacts.of(cache.fresh(), "docs")])
    assert (found.level, found.detail[:45]) == ("ok", "the tokenizers differ in ids that no row uses")


@pytest.mark.parametrize("over_http", [False, True])
def test_their_mass_joins_the_tail_for_a_student(tmp_path: Path, over_http: bool) -> None:
    """Mass of the teacher on tokens that the student does not have is told as that of all others."""
    cache, corpus = corpus_of(tmp_path / "c")
    theirs = sibling("<audio>", "<more>", "<yet>")
    teacher = FakeTeacher(identity_of(theirs))
    k = VOCAB + 8
    planned = cache.plan_targets("t", "docs", teacher.identity, fields=Fields(k=k), encoding="f32", tokenizer=theirs)
    commit(planned, teacher, range(corpus.num_shards))
    config: dict[str, Any] = {
        "data": {"cache": str(tmp_path / "c"), "corpus": "docs"},
        "teachers": [{"name": "t"}],
        "student": {"config": {"model_type": "llama"}},
        "train": {"out": str(tmp_path / "out"), "steps": 1},
    }
    with ExitStack() as stack:
        if over_http:
            url = stack.enter_context(serving_teachers(hosted("t", teacher), cache=cache.fresh()))
            config["data"]["cache"] = url
        settings = TrainConfig.of(config)
        opened = stack.enter_context(open_cache(settings.data))
        [source] = stack.enter_context(open_sources(settings.teachers, opened, opened.corpus("docs")))
        [targets] = source.read([0], [corpus.row(0)])
    kept = planned.read_rows([0])[0]
    swapped = kept.ids != targets.ids
    np.testing.assert_array_equal(np.sort(kept.ids[swapped].reshape(-1, 3)), [[256, 257, 258]] * len(kept.ids))
    assert (targets.ids[swapped] == np.iinfo(np.int32).max).all()
    assert int(targets.ids[~swapped].max()) < VOCAB + 8
