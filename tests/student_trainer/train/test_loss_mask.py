"""Targets that a corpus says are not to be learnt: they count nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.edges.e16_mask_in_training import ROWS, cross_entropy_error, masked_corpus, reader_of
from potstill.cache.cache import Cache
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.sources import cache_source
from potstill.student_trainer.evaluate.student import evaluate_student
from potstill.student_trainer.losses import distillation_loss
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import VOCAB, K, config_of, fake_teacher, fill

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = masked_corpus(tmp_path_factory.mktemp("masked"))
    fill(root, "fake")
    return root


def reader(root: Path) -> BatchReader:
    cache = Cache.open(root)
    return BatchReader(cache.corpus("docs"), (cache_source("fake", cache.targets("fake", "docs")),), (1.0,))


def taught(root: Path) -> list[np.ndarray]:
    return Cache.open(root).corpus("docs").take_loss_mask(range(ROWS))


def test_counts_are_of_what_is_taught(root: Path) -> None:
    masks = taught(root)
    labels, positions = sum(int(m[:-1].sum()) for m in masks), sum(int(m.sum()) for m in masks)
    counts = reader(root).measure(np.arange(ROWS))
    assert (counts.num_labels, counts.num_positions) == (labels, positions)
    batch = reader(root).read(range(ROWS))
    assert (batch.num_labels, batch.num_positions) == (labels, positions)
    assert not masks[2].any()
    alone = reader(root).read([2])
    assert (alone.num_labels, alone.num_positions) == (0, 0)


def test_the_gradient_of_the_cross_entropy_is_that_of_taught_positions(root: Path) -> None:
    counted, error = cross_entropy_error(reader_of(root))
    assert counted == sum(int(m.sum()) for m in taught(root))
    assert error < 1e-12


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_gradient_of_every_loss_is_that_of_taught_positions(root: Path, alpha: float) -> None:
    """Against a dense float64 loss of each taught position, where all ids have their own target."""
    masks, rows = taught(root), Cache.open(root).corpus("docs").take(range(ROWS))
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((ROWS, 10, VOCAB)))
    dense, ours = logits.clone().requires_grad_(), torch.zeros_like(logits)
    counts = reader(root).measure(np.arange(ROWS))
    num_labels, num_positions = counts.num_labels, counts.num_positions
    total = dense.new_zeros(())
    for i, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        kept = fake_teacher().distribution(row, K)
        for t in np.flatnonzero(mask):
            log_p = dense[i, t].log_softmax(-1)
            ids, logprobs = torch.from_numpy(kept.ids[t].astype(np.int64)), torch.from_numpy(kept.logprobs[t]).double()
            outside = torch.ones(VOCAB, dtype=torch.bool).scatter_(0, ids, False)
            r = 1 - logprobs.exp().sum()
            kl = (logprobs.exp() * (logprobs - log_p[ids])).sum() + r * (r.log() - log_p[outside].logsumexp(0))
            total = total + alpha * kl / num_positions
            if t < len(row) - 1:
                total = total - (1 - alpha) * log_p[int(row[t + 1])] / num_labels
    total.backward()  # type: ignore[no-untyped-call]
    for part in ([0, 1], [2], [3, 4, 5]):
        batch = reader(root).read(part)
        z = logits[part].clone().requires_grad_()
        loss = distillation_loss(
            z,
            batch.labels,
            batch.teachers,
            alpha=alpha,
            mask=batch.mask,
            num_labels=num_labels,
            num_positions=num_positions,
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        ours[part] = z.grad
    assert dense.grad is not None
    torch.testing.assert_close(ours, dense.grad, atol=1e-5, rtol=1e-4)
    untaught = ~torch.from_numpy(np.stack(masks))
    assert (ours[untaught] == 0).all()


def test_evaluation_is_of_taught_positions(root: Path, tmp_path: Path) -> None:
    model = build_student(config_of(root, tmp_path).student, seed=3, vocab_size=VOCAB, row_tokens=10)[0].eval()
    corpus, ce, labels = Cache.open(root).corpus("docs"), 0.0, 0
    for row, mask in zip(corpus.take(range(ROWS)), taught(root), strict=True):
        with torch.no_grad():
            log_p = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].log_softmax(-1)
        for t in np.flatnonzero(mask[:-1]):
            ce, labels = ce - float(log_p[t, int(row[t + 1])]), labels + 1
    found = evaluate_student(model, reader(root), range(ROWS), batch_rows=4)
    assert (found.rows, found.documents, found.tokens) == (ROWS, ROWS, sum(int(m.sum()) for m in taught(root)))
    assert found.ce == pytest.approx(ce / labels, rel=1e-5)
    nothing = evaluate_student(model, reader(root), [2])
    assert (nothing.tokens, nothing.teachers) == (0, {})


def test_a_run_counts_the_targets_it_learnt(root: Path, tmp_path: Path) -> None:
    """Also in a step of the row without any, which moves nothing but by weight decay."""
    loop = {"batch_rows": 1, "micro_batch_rows": 1, "steps": 2 * ROWS, "weight_decay": 0.0, "eval_every": 100}
    result = train(config_of(root, tmp_path / "run", data={"held_out": 0}, train=loop))
    assert result.tokens == 2 * sum(int(m.sum()) for m in taught(root))
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert sum(record["loss"] == record["grad_norm"] == 0 for record in records) == 2
