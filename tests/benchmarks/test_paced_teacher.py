from __future__ import annotations

import numpy as np

from benchmarks.support.paced_teacher import PacedTeacher
from potstill.cache import Fields
from potstill.cache.encoding.fields import check_fields
from tests.support.fakes import FakeTeacher, fake_identity


def test_what_the_tables_give_is_what_their_full_distribution_gives() -> None:
    teacher = PacedTeacher(fake_identity(vocab_size=100), tables=5)
    row = np.random.default_rng(0).integers(0, 100, 40).astype(np.uint32)
    want = Fields(k=6, draws=30, entropy=True, temperatures=(2.0,), dense=True)
    fast, plain = teacher.targets(row, want), FakeTeacher.targets(teacher, row, want)
    check_fields(fast, want, 100)
    np.testing.assert_array_equal(fast.ids, plain.ids)
    for name in ("logprobs", "log_tail", "label_logprob", "entropy", "log_z", "dense"):
        np.testing.assert_allclose(getattr(fast, name), getattr(plain, name), atol=1e-5, err_msg=name)


def test_a_row_scored_in_any_batch_gives_the_same_bits() -> None:
    teacher = PacedTeacher(fake_identity(vocab_size=100), tables=5)
    row = np.random.default_rng(1).integers(0, 100, 40).astype(np.uint32)
    want = Fields(k=0, draws=30)
    whole, part = teacher.targets(row, want), teacher.targets(row[:25], want)
    assert whole.draws is not None
    assert part.draws is not None
    np.testing.assert_array_equal(whole.draws[:25].ids, part.draws.ids)
    np.testing.assert_array_equal(whole.draws[:25].counts, part.draws.counts)
