"""Measures at single positions against scipy in float64: odd vocabularies, impossible tokens, few kept ids."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr

from potstill.student_trainer.evaluate.positions import KEPT, WHOLE, of_labels, of_top_k, of_whole
from potstill.student_trainer.losses import MIN_TAIL_MASS, NO_LABEL, TeacherTargets

N, V = 40, 30


def logprobs(vocab: int, seed: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = log_softmax(np.random.default_rng(seed).normal(0.0, 3.0, (N, vocab)), axis=1)
    return found


def whole(log_p: NDArray[np.float64], log_t: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    found = of_whole(torch.from_numpy(log_p), torch.from_numpy(log_t)).numpy()
    return {name: found[:, i] for i, name in enumerate(WHOLE)}


def test_whole_distributions_against_scipy() -> None:
    log_p, log_t = logprobs(V, 0), logprobs(V, 1)
    p, t = np.exp(log_p), np.exp(log_t)
    found = whole(log_p, log_t)
    np.testing.assert_allclose(found["full_kl"], rel_entr(t, p).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["reverse_kl"], rel_entr(p, t).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["total_variation"], 0.5 * np.abs(p - t).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["acceptance"], np.minimum(p, t).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["acceptance"], 1 - found["total_variation"], rtol=1e-9)
    same = whole(log_p, log_p)
    np.testing.assert_allclose([same[name].max() for name in WHOLE[1:4]], 0.0, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(V, V + 7), (V + 7, V)])
def test_ids_that_only_one_has_are_one_id_of_no_mass_to_the_other(ours: int, theirs: int) -> None:
    log_p, log_t = logprobs(ours, 2), logprobs(theirs, 3)
    # One more id for what is outside, of the least mass where there is none.
    p, t = (np.column_stack([np.exp(each)[:, :V], np.exp(each)[:, V:].sum(axis=1)]) for each in (log_p, log_t))
    floor = np.r_[np.zeros(V), MIN_TAIL_MASS]
    found = whole(log_p, log_t)
    kl = np.where(t > 0, t * np.log(np.where(t > 0, t, 1) / np.maximum(p, floor)), 0).sum(axis=1)
    reverse = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.maximum(t, floor)), 0).sum(axis=1)
    np.testing.assert_allclose(found["full_kl"], kl, rtol=1e-10)
    np.testing.assert_allclose(found["reverse_kl"], reverse, rtol=1e-10)
    np.testing.assert_allclose(found["total_variation"], 0.5 * np.abs(p - t).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["acceptance"], np.minimum(p, t).sum(axis=1), rtol=1e-10)


def test_a_token_that_the_teacher_rules_out_costs_much_and_not_all() -> None:
    log_p, log_t = logprobs(V, 4), logprobs(V, 5)
    log_t[:, 3] = -math.inf
    log_t = log_softmax(log_t, axis=1)
    found = whole(log_p, log_t)
    p, t = np.exp(log_p), np.exp(log_t)
    np.testing.assert_allclose(found["full_kl"], rel_entr(t, p).sum(axis=1), rtol=1e-10)
    rest = np.delete(p, 3, axis=1) * (np.delete(log_p, 3, axis=1) - np.delete(log_t, 3, axis=1))
    np.testing.assert_allclose(
        found["reverse_kl"], rest.sum(axis=1) + p[:, 3] * (log_p[:, 3] - math.log(MIN_TAIL_MASS)), rtol=1e-10
    )


def test_a_teachers_numbers_are_made_to_sum_to_one() -> None:
    log_p, log_t = logprobs(V, 6), logprobs(V, 7)
    off = whole(log_p, log_t + 0.001)
    for name, values in whole(log_p, log_t).items():
        np.testing.assert_allclose(off[name], values, rtol=1e-10)


def test_the_top_k_against_sets() -> None:
    log_p, log_t, k = logprobs(V, 8), logprobs(V, 9), 5
    ids = np.argsort(-log_t, axis=1)[:, :k]
    kept = np.take_along_axis(log_t, ids, axis=1)
    kept[::2, 3:] = -math.inf  # filled up, as rows with three ids beside ones with five
    ids[::2, 3:] = 2**31 - 1
    tail = np.log1p(-np.exp(kept).sum(axis=1))
    teacher = TeacherTargets(torch.from_numpy(ids), torch.from_numpy(kept), torch.from_numpy(tail))
    found = dict(zip(KEPT, of_top_k(torch.from_numpy(log_p), teacher).numpy().T, strict=True))
    for n in range(N):
        here = ids[n][kept[n] > -math.inf]
        likeliest = set(np.argsort(-log_p[n])[: len(here)].tolist())
        assert found["overlap"][n] == pytest.approx(len(likeliest & set(here.tolist())) / len(here))
        assert found["top1"][n] == (here[0] == log_p[n].argmax())
        mass, p_tail = np.exp(log_p[n, here]), 1 - np.exp(log_p[n, here]).sum()
        assert found["mass"][n] == pytest.approx(mass.sum())
        t, t_tail = np.exp(log_t[n, here]), np.exp(tail[n])
        assert found["kl"][n] == pytest.approx(rel_entr(t, mass).sum() + rel_entr(t_tail, p_tail))


def test_projected_positions_count_by_what_is_resolved() -> None:
    """One of which nothing is known would be a perfect KL of 0 in the mean, and a wrong likeliest id."""
    log_p, log_t, k = torch.from_numpy(logprobs(V, 11)), torch.from_numpy(logprobs(V, 12)), 5
    kept, ids = log_t.topk(k)
    own = TeacherTargets(ids, kept, torch.log1p(-kept.exp().sum(dim=-1)))
    alignment = torch.zeros(N, 3, dtype=torch.float64)
    alignment[1:, 0] = 1.0
    projected = replace(own, alignment=alignment)
    assert torch.equal(of_top_k(log_p, projected)[0], of_top_k(log_p, own)[0])
    assert not of_top_k(log_p, projected)[1:].any()


def test_positions_without_a_label_count_nothing() -> None:
    labels = torch.full((N,), NO_LABEL)
    assert not of_labels(torch.from_numpy(logprobs(V, 10)), labels).any()
