"""Another temperature, by the log Z that is kept, against the dense distribution at it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from potstill.cache.encoding import ENCODINGS, RankTable, decode, encode
from potstill.cache.errors import InvalidInput
from potstill.cache.types import Targets
from potstill.student_trainer.losses import NO_LABEL, Objective, TeacherTargets, distillation_loss
from tests.student_trainer.losses.dense_forms import TOP_K_LOSSES, dense_loss, random_array, top_k_of

N, V = 5, 37


def with_log_z(dense: torch.Tensor, k: int, temperature: float, weight: float) -> TeacherTargets:
    top = top_k_of(dense, k, weight=weight)
    log_z = torch.logsumexp(dense / temperature, -1)
    return TeacherTargets(top.ids, top.logprobs, top.log_tail, weight, log_z=log_z)


@pytest.mark.parametrize("name", TOP_K_LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_it_is_the_dense_form(name: str, temperature: float, alpha: float) -> None:
    denses = [torch.log_softmax(2 * random_array(seed, N, V), -1) for seed in (0, 1)]
    teachers = [with_log_z(dense, k, temperature, w) for dense, k, w in zip(denses, (6, 4), (0.4, 0.6), strict=True)]
    labels, mask = torch.tensor([1, 2, NO_LABEL, 4, 5]), torch.ones(N, dtype=torch.bool)
    objective, z = Objective(name, temperature=temperature), random_array(2, N, V)
    exact, z = z.clone().requires_grad_(), z.requires_grad_()
    counts: dict[str, Any] = {"num_labels": 4, "num_positions": 5}
    expected = dense_loss(exact, labels, mask, teachers, objective, alpha=alpha, **counts)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss = distillation_loss(z, labels, teachers, alpha=alpha, mask=mask, objective=objective, **counts)
    (grad,) = torch.autograd.grad(loss.total, z)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (grad - expected_grad).abs().max() < 1e-10 * expected_grad.abs().max()


def test_a_teachers_own_distribution_at_a_temperature_is_agreed_with() -> None:
    """The factor T**2 and the renormalised top-k would both be zero here, too; a tail that is guessed would not."""
    dense = torch.log_softmax(random_array(3, N, V), -1)
    z = dense.clone().requires_grad_()
    mask = torch.ones(N, dtype=torch.bool)
    loss = distillation_loss(
        z,
        torch.full((N,), NO_LABEL),
        [with_log_z(dense, 3, 2.0, 1.0)],
        alpha=1,
        mask=mask,
        num_labels=0,
        num_positions=1,
        objective=Objective(temperature=2.0),
    )
    (grad,) = torch.autograd.grad(loss.total, z)
    assert abs(loss.total.item()) < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [0.25, 0.5])
def test_rounding_of_what_is_kept_is_no_mass_over_one(temperature: float) -> None:
    """At a low temperature the error of `u8` is larger: what it keeps would sum to 1.05 here."""
    positions, vocab = 300, 80
    dense = torch.log_softmax(2 * random_array(4, positions, vocab), -1)
    exact = with_log_z(dense, 64, temperature, 1.0)
    ids, logprobs, log_tail = exact.ids.numpy(), exact.logprobs.float().numpy(), exact.log_tail.float().numpy()
    targets = Targets(ids.astype(np.uint32), logprobs, log_tail, np.full(positions, np.nan, np.float32))
    ranks = RankTable.plain(vocab)
    kept = torch.from_numpy(decode(encode(targets, ENCODINGS["u8"], ranks), ENCODINGS["u8"], ranks).logprobs)
    assert exact.log_z is not None
    rounded = replace(exact, logprobs=kept)
    assert (kept.double() / temperature - exact.log_z[:, None]).exp().sum(-1).max() > 1.01

    def loss_of(teacher: TeacherTargets) -> float:
        return distillation_loss(
            torch.zeros(positions, vocab),
            torch.full((positions,), NO_LABEL),
            [teacher],
            alpha=1,
            mask=torch.ones(positions, dtype=torch.bool),
            num_labels=0,
            num_positions=positions,
            objective=Objective(temperature=temperature),
        ).total.item()

    assert loss_of(rounded) == pytest.approx(loss_of(exact), rel=0.05)
    with pytest.raises(InvalidInput, match=r"teacher 0 has a position whose probabilities sum to"):
        loss_of(replace(rounded, log_z=exact.log_z - 1.0))
