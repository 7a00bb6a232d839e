"""The worker's arithmetic on plain tensors, against torch's own and float64: the compiled one, and that of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from potstill.cache.encoding.draws import uniforms
from potstill.cache.types import Draws, Fields
from potstill.teacher_service.capture.cpu.device import capture_on_cpu
from potstill.teacher_service.capture.device import capture_with_torch
from potstill.teacher_service.capture.layout import float_sections, num_floats, split
from potstill.teacher_service.engine.vllm_teacher import MAX_TEMPERATURE, MIN_TEMPERATURE

# A multiple of 32 and of 128, neither, and so small that nothing is left out.
VOCABS = (32_000, 50_257, 300)


Captured = Callable[..., dict[str, Any]]


@pytest.fixture(params=[capture_on_cpu, capture_with_torch], ids=["cpu", "gpu"])
def captured(request: pytest.FixtureRequest) -> Captured:
    """From logits and what is wanted to every section as numpy, `ids`, and `draws`."""

    def capture(logits: torch.Tensor, want: Fields, *, row_key: bytes = b"row") -> dict[str, Any]:
        num_rows, vocab_size = logits.shape
        sections = float_sections(want, num_rows, vocab_size)
        out = split(torch.empty(num_floats(sections)), sections)
        out["ids"] = torch.empty((num_rows, want.k), dtype=torch.int32)
        chances = uniforms(num_rows, want.draws, want.seed, row_key) if want.draws else None
        labels = torch.arange(num_rows) if want.k else None
        drawn = request.param(logits, labels, want, chances, out)
        found: dict[str, Any] = {name: tensor.numpy() for name, tensor in out.items()}
        if drawn is not None:
            lengths, ids, counts = drawn
            found["draws"] = Draws(np.append(0, np.cumsum(lengths)), ids.astype(np.uint32), counts.astype(np.uint16))
        return found

    return capture


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).standard_normal((num_rows, vocab_size), np.float32)
    return torch.from_numpy(3 * drawn)


def exact(logits: torch.Tensor) -> NDArray[np.float64]:
    answer: NDArray[np.float64] = logits.double().log_softmax(-1).numpy()
    return answer


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("k", [1, 64, 200])
def test_the_top_k_is_torchs(captured: Captured, vocab_size: int, k: int) -> None:
    logits = random_logits(5, vocab_size)
    logits[3, -20:] += 30  # the best stand where 32 equal parts leave a rest
    found = captured(logits, Fields(k=k))
    values, ids = torch.from_numpy(exact(logits)).topk(k)
    np.testing.assert_array_equal(found["ids"], ids.numpy())
    np.testing.assert_allclose(found["logprobs"], values.numpy(), rtol=3e-7, atol=5e-7)
    np.testing.assert_allclose(found["top"], values[:, 0].numpy(), rtol=3e-7, atol=5e-7)
    np.testing.assert_allclose(found["label_logprob"], exact(logits).diagonal(), rtol=3e-7, atol=5e-7)


@pytest.mark.parametrize("levels", [1, 2, 2000])
def test_equal_entries_are_taken_once_each(captured: Captured, levels: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).integers(0, levels, (4, 32_000)).astype(np.float32))
    found = captured(logits, Fields(k=64))
    best = torch.from_numpy(exact(logits)).topk(64).values.numpy()
    np.testing.assert_allclose(found["logprobs"], best, rtol=3e-7, atol=5e-7)
    assert (np.diff(np.sort(found["ids"], axis=1), axis=1) > 0).all()
    np.testing.assert_array_equal(np.take_along_axis(exact(logits), found["ids"].astype(int), axis=1), best)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_a_vocabulary_whose_padding_was_cut_off_is_read_in_place(captured: Captured, vocab_size: int) -> None:
    want = Fields(k=8, entropy=True, temperatures=(0.5, 2.0), draws=2, seed=3)
    logits = random_logits(5, vocab_size)
    for padding in (64 - vocab_size % 64, 7):
        padded = torch.full((5, vocab_size + padding), 1000.0)
        padded[:, :vocab_size] = logits
        found, whole = captured(padded[:, :vocab_size], want), captured(logits, want)
        np.testing.assert_array_equal(found["draws"].ids, whole["draws"].ids)
        for name in set(found) - {"draws"}:
            np.testing.assert_array_equal(found[name], whole[name])


def test_equal_logits_share_the_mass_however_large_they_are(captured: Captured) -> None:
    found = captured(torch.full((2, 3), -1e30), Fields(k=3))
    for name in ("logprobs", "label_logprob", "top"):
        np.testing.assert_allclose(found[name], np.log(1 / 3), rtol=1e-6)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_entropy_and_log_z_are_those_of_float64(captured: Captured, vocab_size: int) -> None:
    logits = random_logits(6, vocab_size)
    logits[1] *= 20  # nearly all mass on one id
    logits[2] = 0
    logits[3, ::3] = -torch.inf
    temperatures = (0.1, 0.5, 1.0, 2.0, 7.0)
    found = captured(logits, Fields(k=0, entropy=True, temperatures=temperatures))
    dense = exact(logits)
    entropy = -(np.exp(dense) * np.where(np.isneginf(dense), 0, dense)).sum(axis=1)
    np.testing.assert_allclose(found["entropy"], entropy, atol=1e-4)
    for column, temperature in enumerate(temperatures):
        log_z = np.logaddexp.reduce(dense / temperature, axis=1)
        np.testing.assert_allclose(found["log_z"][:, column], log_z, atol=1e-4)


def test_log_z_is_finite_at_the_bounds_of_temperature(captured: Captured) -> None:
    logits = random_logits(4, 32_000)
    logits[1] *= 30  # nearly all mass on one id
    logits[2] = 0
    logits[3, ::3] = -torch.inf
    bounds = (MIN_TEMPERATURE, MAX_TEMPERATURE)
    log_z = captured(logits, Fields(k=0, temperatures=bounds))["log_z"]
    for column, temperature in enumerate(bounds):
        theirs = np.logaddexp.reduce(exact(logits) / temperature, axis=1)
        np.testing.assert_allclose(log_z[:, column], theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperatures", [(2.0, 2.0), (1.0, 2.0, 2.0), (0.5, 0.5, 2.0, 0.5), (3.0, 3.0)])
def test_a_temperature_that_is_asked_for_twice_is_answered_twice(
    captured: Captured, temperatures: tuple[float, ...]
) -> None:
    logits = random_logits(3, 500)
    log_z = captured(logits, Fields(k=0, temperatures=temperatures))["log_z"]
    for column, temperature in enumerate(temperatures):
        theirs = np.logaddexp.reduce(exact(logits) / temperature, axis=1)
        np.testing.assert_allclose(log_z[:, column], theirs, atol=1e-4)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("num_draws", [1, 50, 3000])
def test_draws_are_those_of_the_reference(captured: Captured, vocab_size: int, num_draws: int) -> None:
    """Each id is the one that its number falls on, but for numbers as near to an edge as float32 may move that edge."""
    logits = random_logits(4, vocab_size)
    logits[2, 100:] = -torch.inf
    found = captured(logits, Fields(k=0, draws=num_draws, seed=7))["draws"]
    moved, expected = 0, 0.0
    chances = np.sort(uniforms(4, num_draws, 7, b"row"), axis=1)  # both distributions rise: the sorted go together
    for row, dense in enumerate(exact(logits)):
        ends = np.cumsum(np.exp(dense))
        begins = np.append(0, ends[:-1])
        most, usual = edge_errors(dense)
        drawn = np.repeat(found[row : row + 1].ids, found[row : row + 1].counts).astype(int)
        assert (chances[row] >= begins[drawn] - most[drawn - 1]).all()
        assert (chances[row] <= ends[drawn] + most[drawn]).all()
        moved += int(((chances[row] < begins[drawn]) | (chances[row] >= ends[drawn])).sum())
        expected += num_draws * usual.sum()
    assert moved <= stats.poisson.ppf(1 - 1e-6, expected), "more fell on another id than rounding explains"
    assert found[2:3].ids.max() < 100


def edge_errors(dense: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far float32 may at most, and does usually, move the end of each id's part of [0, 1); both [V].

    A mass has the error of the exponential (1.1e-7) and those of t and t log2 e, each half a unit in the last place of
    it; the sum of a block of 64 ids has 63 roundings. At most they all have one sign; usually (root of the mean square)
    they are independent. What lies before an edge and what lies behind it pull it two ways, in proportion to the other.
    """
    half_ulp = 2.0**-24
    mass = np.exp(dense)
    of_mass = 1.1e-7 + 2 * half_ulp * np.where(mass > 0, dense.max() - dense, 0)
    of_sum = 63 * half_ulp
    before = np.cumsum(mass)
    behind = np.maximum(1 - before, 0)
    errors = np.cumsum(mass * (of_mass + of_sum))
    most = behind * errors + before * (errors[-1] - errors)
    block = np.add.reduceat(mass, np.arange(0, len(mass), 64))
    squares = np.repeat(block**2 * 63 * half_ulp**2, 64)[: len(mass)] / 64 + (mass * of_mass) ** 2
    squares = np.cumsum(squares)
    return most + 1e-12, np.sqrt(behind**2 * squares + before**2 * (squares[-1] - squares))


def counts_of(draws: Draws, vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros((len(draws.offsets) - 1, vocab_size), np.int64)
    counts[np.repeat(np.arange(len(counts)), np.diff(draws.offsets)), draws.ids] = draws.counts
    return counts.reshape(-1)


@pytest.mark.parametrize("num_draws", [50, 20_000])
def test_draws_follow_the_full_softmax(captured: Captured, num_draws: int) -> None:
    """Chi-square over all draws, with ids joined until each cell is expected ten times: both ways of looking up."""
    num_rows, vocab_size = (400, 8192) if num_draws == 50 else (1, 8192)
    logits = random_logits(1, vocab_size).expand(num_rows, -1).contiguous()
    found = captured(logits, Fields(k=0, draws=num_draws, seed=1))["draws"]
    seen = counts_of(found, vocab_size).reshape(num_rows, vocab_size).sum(axis=0)
    expected = np.exp(exact(logits)[0]) * num_rows * num_draws
    cell = np.minimum((np.cumsum(expected) / 10).astype(int), int(num_rows * num_draws / 10) - 1)
    joined = [np.bincount(cell, weights=values)[np.unique(cell)] for values in (seen, expected)]
    assert len(joined[0]) > 200
    assert stats.chisquare(joined[0], joined[1] * joined[0].sum() / joined[1].sum()).pvalue > 1e-4


def test_the_tail_is_not_lost_beside_a_heavy_id(captured: Captured) -> None:
    """Behind an id with nearly all mass, 127 ids of one block share 1e-4 of it: a float32 sum would be too coarse."""
    logits = torch.full((2000, 8192), -torch.inf)
    logits[:, 0] = 0
    logits[:, 1:128] = float(np.log(1e-2 / 127))
    counts = counts_of(captured(logits, Fields(k=0, draws=50, seed=2))["draws"], 8192).reshape(2000, -1).sum(axis=0)
    expected = 100_000 * 1e-2 / 1.01
    assert abs(counts[1:128].sum() - expected) < 5 * expected**0.5
    assert stats.chisquare(counts[1:128]).pvalue > 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("want", [Fields(k=8), Fields(k=0, draws=4), Fields(k=8, draws=300, entropy=True)])
def test_logits_that_are_no_numbers_show_in_top_and_hurt_no_other_row(
    captured: Captured, bad: float, want: Fields
) -> None:
    logits = random_logits(3, 32_000)
    whole = captured(logits, want)
    if bad == -torch.inf:
        logits[1] = bad
    else:
        logits[1, 500] = bad
    found = captured(logits, want)
    assert np.isnan(found["top"]).tolist() == [False, True, False]
    for name in set(found) - {"draws"}:
        np.testing.assert_array_equal(found[name][[0, 2]], whole[name][[0, 2]])


def test_uniforms_of_a_part_are_those_of_the_row() -> None:
    whole = uniforms(23, 7, 5, b"row")
    for start in range(23):
        np.testing.assert_array_equal(uniforms(23 - start, 7, 5, b"row", start=start), whole[start:])
