"""Our `/v1/completions` beside vLLM's own server, and a released TRL that is pointed from one to the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import http
from tests.support.processes.vllm_server import potstill_serving, vllm_serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROWS = [[(i * 37 + r * 11) % 511 + 1 for i in range(length)] for r, length in enumerate((2, 9, 60, 200))]
# Of two engines on float32: their batches differ.
NATS = 1e-3


@pytest.fixture(scope="module")
def vllm_url(tiny_llama: Path) -> Iterator[str]:
    with vllm_serving(tiny_llama) as url:
        yield url


@pytest.fixture(scope="module")
def our_url(tiny_llama: Path) -> Iterator[str]:
    with potstill_serving(tiny_llama) as url:
        yield url


def answered(url: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = http.post(f"{url}/v1/completions", json={"model": "tiny", **body}, timeout=300.0)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


@pytest.mark.parametrize("k", [0, 1, 16, 64])
def test_every_field_is_as_vllm_writes_it(vllm_url: str, our_url: str, k: int) -> None:
    body = {"prompt": ROWS, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k, "return_token_ids": True}
    theirs, ours = answered(vllm_url, body), answered(our_url, body)
    assert list(ours) == list(theirs)
    assert ours["usage"] == theirs["usage"]
    assert ours["object"] == theirs["object"]
    for our_choice, their_choice in zip(ours["choices"], theirs["choices"], strict=True):
        assert list(our_choice) == list(their_choice)
        for key in ("index", "logprobs", "stop_reason", "token_ids", "prompt_token_ids", "routed_experts"):
            assert our_choice[key] == their_choice[key], key
        assert_same_logprobs(our_choice["prompt_logprobs"], their_choice["prompt_logprobs"], k)


def assert_same_logprobs(ours: list[Any], theirs: list[Any], k: int) -> None:
    """Same first id; the others may change places where they are as probable; ranks but for what is outside the K."""
    assert ours[0] is theirs[0] is None
    swapped = 0
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        assert next(iter(our)) == next(iter(their))
        assert abs(len(our) - len(their)) <= 1
        swapped += list(our) != list(their)
        for key in our.keys() & their.keys():
            assert set(our[key]) == set(their[key])
            assert abs(our[key]["logprob"] - their[key]["logprob"]) < NATS
        own = next(iter(our))
        expected = min(their[own]["rank"], max(k, 1) + 1)
        assert abs(our[own]["rank"] - expected) <= 1
    assert swapped <= len(ours) // 50


def test_the_token_after_the_prompt_and_echo_are_as_vllm_writes_them(vllm_url: str, our_url: str) -> None:
    body = {"prompt": ROWS, "max_tokens": 1, "temperature": 0, "logprobs": 3, "return_tokens_as_token_ids": True}
    for extra in ({}, {"echo": True}, {"echo": True, "prompt_logprobs": 8}, {"echo": True, "max_tokens": 0}):
        # vLLM puts a prompt's text before an echo; there is none here.
        theirs, ours = answered(vllm_url, {**body, **extra}), answered(our_url, {**body, **extra})
        for our_choice, their_choice in zip(ours["choices"], theirs["choices"], strict=True):
            our, their = our_choice["logprobs"], their_choice["logprobs"]
            assert our["tokens"] == their["tokens"]
            assert our["text_offset"] == their["text_offset"]
            assert our["token_logprobs"][0] is None or not extra
            pairs = zip(our["token_logprobs"], their["token_logprobs"], strict=True)
            assert all(a is b is None or abs(a - b) < NATS for a, b in pairs)
            assert [len(top or ()) for top in our["top_logprobs"]] == [len(top or ()) for top in their["top_logprobs"]]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"model": "other"}, 404), ({"prompt": [512]}, 400), ({"prompt_logprobs": 257}, 400), ({"prompt": []}, 400)],
)
def test_what_vllm_refuses_is_refused_with_its_status(
    vllm_url: str, our_url: str, body: dict[str, Any], status: int
) -> None:
    asked = {"model": "tiny", "prompt": [1, 2], "prompt_logprobs": 1, "max_tokens": 1, **body}
    replies = [http.post(f"{url}/v1/completions", json=asked) for url in (vllm_url, our_url)]
    assert [reply.status_code for reply in replies] == [status, status]
    theirs, ours = (reply.json()["error"] for reply in replies)
    assert set(ours) == set(theirs)
    assert (ours["code"], ours["type"]) == (theirs["code"], theirs["type"])


def test_models_are_listed_with_what_clients_read(vllm_url: str, our_url: str) -> None:
    [theirs], [ours] = (http.get(f"{url}/v1/models").json()["data"] for url in (vllm_url, our_url))
    assert set(ours) == set(theirs)
    assert (ours["id"], ours["max_model_len"]) == (theirs["id"], theirs["max_model_len"])


@pytest.mark.parametrize(("top_k", "beta"), [(16, 0.0), (1, 0.5)])
def test_a_released_trl_trains_the_same_from_either_server(
    vllm_url: str, our_url: str, tmp_path: Path, top_k: int, beta: float
) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed; it is in the extra `dev` (trl==1.16.0)")
    from benchmarks.support.trl_distillation import losses_of_a_run
    from tests.support.tiny_models import make_tiny_llama

    student = make_tiny_llama(tmp_path / "student", seed=1)
    runs = [
        losses_of_a_run(student, url, tmp_path / name, steps=6, top_k=top_k, beta=beta)
        for name, url in (("vllm", vllm_url), ("ours", our_url))
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=NATS)
    assert np.isfinite(runs[1]).all()
    assert runs[1][-1] < runs[1][0]
