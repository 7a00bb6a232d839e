"""The start-up self-check finds what a private path could do wrong. Targets are made, no engine runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from potstill.cache.encoding.draws import draw_rows
from potstill.cache.types import Draws, Fields, Targets
from potstill.teacher_service.capture.check import checked_fields, checked_row, disagreement
from tests.support.fakes import FakeTeacher, fake_identity

VOCAB = 300
TEACHER = FakeTeacher(fake_identity(vocab_size=VOCAB))
ROW = np.array(checked_row(VOCAB, 8), np.uint32)
WANT = checked_fields(VOCAB, 256, every_field=True)
PUBLIC = TEACHER.targets(ROW, Fields(k=VOCAB))


def changed(**arrays: Any) -> Targets:
    return replace(TEACHER.targets(ROW, WANT), **arrays)


def test_equal_paths_agree() -> None:
    assert disagreement(changed(), PUBLIC, WANT, ROW) == ""
    top_k = checked_fields(VOCAB, 8, every_field=False)
    assert top_k == Fields(k=8)
    assert disagreement(TEACHER.targets(ROW, top_k), PUBLIC, top_k, ROW) == ""


def test_ties_may_stand_in_any_order() -> None:
    dense = np.log(np.full((len(ROW), 4), 0.25, np.float32))
    ids = np.tile(np.arange(4, dtype=np.uint32), (len(ROW), 1))
    nothing = np.full(len(ROW), -np.inf, np.float32)
    label = np.append(dense[1:, 0], np.float32(np.nan))
    ours = Targets(ids[:, ::-1][:, :2], dense[:, :2], nothing, label)
    assert disagreement(ours, Targets(ids, dense, nothing, label), Fields(k=2), ROW) == ""


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("ids", lambda ids: np.roll(ids, 1, axis=0), "ids differ"),
        ("ids", lambda ids: np.roll(ids, 1, axis=1), "ids differ"),
        ("logprobs", lambda logprobs: logprobs / 2, "logprobs differ"),
        ("logprobs", lambda logprobs: logprobs + 1e-3, "logprobs differ"),
        ("label_logprob", lambda label: np.roll(label, 1), "labels"),
        ("entropy", lambda entropy: entropy + 1e-3, "entropy"),
        ("log_z", lambda log_z: log_z[:, ::-1], "log_z"),
        ("dense", lambda dense: dense + 0.1, "do not sum to 1"),
        ("dense", lambda dense: np.roll(dense, 1, axis=1), "not the public path's"),
        ("draws", lambda _: draw_rows(TEACHER.dense_logprobs(ROW), 50, 2, ROW.tobytes()), "draws"),
        ("draws", lambda draws: Draws(draws.offsets, (draws.ids + 1) % VOCAB, draws.counts), "draws"),
    ],
)
def test_a_wrong_path_is_found(name: str, change: Any, reason: str) -> None:
    wrong = changed(**{name: change(getattr(changed(), name))})
    assert reason in disagreement(wrong, PUBLIC, WANT, ROW)


def test_a_target_too_few_is_found() -> None:
    assert "7 targets instead of 8" in disagreement(changed()[:7], PUBLIC, WANT, ROW)


def test_nan_is_no_agreement() -> None:
    logprobs = changed().logprobs.copy()
    logprobs[2, 3] = np.nan
    assert disagreement(changed(logprobs=logprobs), PUBLIC, WANT, ROW)


def test_the_row_fits_the_smallest_model() -> None:
    assert checked_row(2, 1) == [0]
    assert max(checked_row(5, 100)) < 5
