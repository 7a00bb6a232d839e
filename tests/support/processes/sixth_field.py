"""A sixth field on its way through the house; run where `tests.cache.test_sixth_field` has added it to the code.

The field is `margin`, [P] float32: the top entry's logprob less that of the second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache import Cache
from potstill.cache.commands.field_options import add_field_options, fields_of
from potstill.cache.encoding.fields import check_fields
from potstill.cache.errors import SpecMismatch, TeacherFailed, UnsupportedField
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.types import Fields, Targets, Tokens
from potstill.cache.wanted import named_fields
from potstill.cache.wire import scores as wire
from potstill.clients.http_targets import HttpCache
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.teacher_service.capture.layout import float_sections
from tests.support import http
from tests.support.command_line import run
from tests.support.corpora import VOCAB, byte_tokenizer, make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers

ASKED: dict[str, Any] = {"margin": True}
BOTH, ALONE = Fields(k=4, **ASKED), Fields(k=0, **ASKED)


class MarginTeacher(FakeTeacher):
    """Also gives the margin."""

    def targets(self, row: Tokens, want: Fields) -> Targets:
        top = self.distribution(row, 2).logprobs
        more: dict[str, Any] = {"margin": top[:, 0] - top[:, 1]}
        held = super().targets(row, want)
        return replace(held, **more) if "margin" in [field.name for field in want.asked] else held


def margin(targets: Targets) -> Any:
    return targets.beside_top_k["margin"]


def wishes() -> None:
    assert Fields.from_json(BOTH.to_json()) == BOTH
    assert BOTH.without(Fields(k=4)) == ALONE
    assert Fields(k=4).joined(ALONE) == BOTH
    with pytest.raises(SpecMismatch):
        BOTH.without(Fields(k=3))
    with pytest.raises(UnsupportedField, match="margin is not kept"):
        named_fields(Fields(k=4), ["margin"], None, "who")
    assert named_fields(BOTH, ["margin"], None, "who") == ALONE
    assert (BOTH.label, BOTH.text) == ("top-4_margin", "top-4, margin")
    assert BOTH.bytes_per_position(VOCAB) == Fields(k=4).bytes_per_position(VOCAB) + 4
    parser = argparse.ArgumentParser()
    add_field_options(parser)
    assert fields_of(parser.parse_args(" ".join(BOTH.options).split())) == BOTH
    assert float_sections(ALONE, 7, VOCAB) == {"top": (7,), "margin": (7,)}


def answers(teacher: MarginTeacher, row: Tokens) -> None:
    exact = teacher.targets(row, BOTH)
    assert repr(exact) == f"Targets(positions={len(row)}, k=4, fields=margin)"
    negative: dict[str, Any] = {"margin": -margin(exact) - 1}
    for nonsense in (replace(exact, **negative), exact.only(Fields(k=4))):
        with pytest.raises(TeacherFailed, match="margin"):
            check_fields(nonsense, BOTH, VOCAB)
    [back] = wire.answer_from_arrow(wire.answer_to_arrow(wire.ScoreAnswer(teacher.identity, [exact]), BOTH)).targets
    np.testing.assert_array_equal(margin(back), margin(exact))
    assert len(wire.targets_to_json(exact)["margin"]) == len(row)  # type: ignore[arg-type]


def cached(root: Path) -> None:
    cache, corpus = make_corpus(root)
    teacher = MarginTeacher(teacher_for(corpus).identity)
    answers(teacher, corpus.row(0))
    # Added to a top-k that is kept already, as any other field is.
    for fields in (Fields(k=4), BOTH):
        asyncio.run(fill(teacher, plan_targets(cache, teacher, fields=fields), FillPlan()))
    targets = cache.targets("fake", "docs")
    assert (root / "targets/fake/docs/sets/margin").is_dir()
    exact = Targets.concat([teacher.targets(corpus.row(i), BOTH) for i in range(len(corpus))])
    read = targets.read(0, corpus.num_positions)
    np.testing.assert_allclose(margin(read), margin(exact), rtol=2**-11)
    np.testing.assert_array_equal(targets.read_column("margin", 0, corpus.num_positions), margin(read))
    assert run("verify", root) == 0
    served(cache, teacher, read)
    files = root.parent / "files"
    assert run("export", root, "--corpus", "docs", "--teacher", "fake", "--to", files) == 0
    byte_tokenizer().save(str(root.parent / "tokenizer.json"))
    into = ("--cache", root, "--corpus", "again", "--teacher", "fake", "--tokenizer", root.parent / "tokenizer.json")
    assert run("import", *sorted(files.glob("*.parquet")), *into) == 0
    np.testing.assert_array_equal(margin(cache.targets("fake", "again").read(0, 50)), margin(read)[:50])


def served(cache: Cache, teacher: FakeTeacher, read: Targets) -> None:
    with serving_teachers(hosted("fake", teacher), cache=cache) as url:
        with HttpCache(url) as there:
            targets = there.targets("fake", "docs")
            np.testing.assert_array_equal(margin(targets.read(0, read.num_positions, fields=ALONE)), margin(read))
            np.testing.assert_array_equal(targets.read_column("margin", 3, 9), margin(read)[3:9])
        row = np.array([9, 8, 7], np.uint32)
        with SyncHttpTeacher(url, "fake") as far:
            np.testing.assert_array_equal(margin(far.score([row], ALONE)[0]), margin(teacher.targets(row, ALONE)))
        asked = json.dumps(http.get(f"{url}/openapi.json").json())
        assert '"margin": {"type": "boolean", "default": false}' in asked


def main(arguments: Sequence[str]) -> None:
    wishes()
    cached(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
