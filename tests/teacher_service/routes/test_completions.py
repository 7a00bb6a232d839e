from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from potstill.cache import Cache, Fields, Targets
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.routes.completions.prompt_logprobs import prompt_logprobs_text
from tests.support import http
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.servers import hosted, serving, serving_teachers, wait_ready
from tests.support.scored_rows import random_targets, without_doubles

ROW = [5, 9, 2, 63, 0, 17]
OTHER = [1, 2, 3]


@pytest.fixture
def teacher() -> FakeTeacher:
    return FakeTeacher()


@pytest.fixture
def url(teacher: FakeTeacher) -> Iterator[str]:
    with serving_teachers(hosted("smol", teacher)) as served:
        yield served


def complete(url: str, *, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    reply = http.post(url + path, json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = json.loads(reply.content, object_pairs_hook=without_doubles)
    return answer


def refusal(url: str, *, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    reply = http.post(url + path, json=body)
    assert reply.status_code >= 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error["code"] == reply.status_code
    assert set(error) == {"message", "type", "param", "code"}
    return error


def plainly(row: list[int], targets: Targets, k: int) -> list[dict[str, Any] | None]:
    """What vLLM's server would write of these targets, one Python object after the other."""
    positions: list[dict[str, Any] | None] = [None]
    for token, target in zip(row[1:], range(len(row) - 1), strict=True):
        ids = targets.ids[target].tolist()[: max(k, 1)]
        rank = ids.index(token) + 1 if token in ids else max(k, 1) + 1
        own = targets.logprobs[target, rank - 1] if token in ids else targets.label_logprob[target]
        entries = {str(token): (float(own), rank)}
        for place in range(k):
            entries.setdefault(str(ids[place]), (float(targets.logprobs[target, place]), place + 1))
        positions.append({key: {"logprob": x, "rank": r, "decoded_token": None} for key, (x, r) in entries.items()})
    return positions


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert found[0] is None
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert list(ours) == list(theirs), "the same ids in the same order"
        for key, entry in ours.items():
            assert entry["rank"] == theirs[key]["rank"]
            assert entry["decoded_token"] is None
            # Half a unit of the text's last decimal.
            np.testing.assert_allclose(entry["logprob"], theirs[key]["logprob"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("k", [0, 1, 3, 64])
def test_a_prompt_gets_the_logprobs_that_vllm_would_write(url: str, teacher: FakeTeacher, k: int) -> None:
    answer = complete(url, model="smol", prompt=[ROW, OTHER], max_tokens=1, temperature=1.0, prompt_logprobs=k)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice, row in zip(answer["choices"], (ROW, OTHER), strict=True):
        targets = teacher.targets(np.array(row, np.uint32), Fields(k=max(k, 1)))
        assert_same(choice["prompt_logprobs"], plainly(row, targets, k))


def test_an_answer_has_every_key_that_vllm_writes(url: str) -> None:
    answer = complete(url, model="smol", prompt=ROW, max_tokens=1, prompt_logprobs=2)
    choice = answer.pop("choices")[0]
    choice.pop("prompt_logprobs")
    assert choice == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "prompt_token_ids": None,
        "routed_experts": None,
    }
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "smol",
        "service_tier": None,
        "system_fingerprint": f"potstill-{FakeTeacher().identity.weights_sha256[:12]}",
        "usage": {
            "prompt_tokens": len(ROW),
            "total_tokens": len(ROW) + 1,
            "completion_tokens": 1,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def test_the_token_after_the_prompt_is_the_most_probable_one(url: str, teacher: FakeTeacher) -> None:
    answer = complete(url, prompt=ROW, max_tokens=1, temperature=0, logprobs=2, return_token_ids=True)
    choice = answer["choices"][0]
    last = teacher.dense_logprobs(np.array(ROW, np.uint32))[-1]
    first, second = np.argsort(-last, kind="stable")[:2].tolist()
    assert choice["token_ids"] == [first]
    assert choice["prompt_token_ids"] == ROW
    assert choice["prompt_logprobs"] is None
    assert choice["logprobs"]["tokens"] == [f"token_id:{first}"]
    assert list(choice["logprobs"]["top_logprobs"][0]) == [f"token_id:{first}", f"token_id:{second}"]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], [last[first]], rtol=1e-5)


def test_echo_gives_the_prompt_too(url: str, teacher: FakeTeacher) -> None:
    """As axolotl asks: no model, no max_tokens, `logprobs` true for 1, and keys that vLLM does not know."""
    answer = complete(
        url, prompt=[ROW], echo=True, logprobs=True, prompt_logprobs=4, top_logprobs=4, max_new_tokens=0, temperature=1
    )
    choice = answer["choices"][0]
    assert len(choice["prompt_logprobs"]) == len(ROW)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:-1] == [f"token_id:{token}" for token in ROW]
    assert logprobs["text_offset"][:3] == [0, len("token_id:5"), 2 * len("token_id:5")]
    assert logprobs["token_logprobs"][0] is None
    dense = teacher.dense_logprobs(np.array(ROW, np.uint32))
    np.testing.assert_allclose(
        logprobs["token_logprobs"][1:-1], [dense[i, token] for i, token in enumerate(ROW[1:])], rtol=1e-5
    )
    for top, whole in zip(logprobs["top_logprobs"][1:-1], choice["prompt_logprobs"][1:], strict=True):
        assert list(top) == [f"token_id:{token}" for token in list(whole)[:2]]


def test_without_a_token_after_the_prompt_nothing_is_counted_for_it(url: str) -> None:
    answer = complete(url, prompt=ROW, max_tokens=0, echo=True, logprobs=1, return_token_ids=True)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["token_ids"] == []
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ROW)
    assert len(answer["choices"][0]["prompt_logprobs"]) == len(ROW)


def test_a_long_answer_is_written_while_it_is_sent(url: str, teacher: FakeTeacher) -> None:
    rows = [[(i * 7 + r) % 64 for i in range(120)] for r in range(2)]
    with http.stream("POST", f"{url}/v1/completions", json={"prompt": rows, "prompt_logprobs": 60}) as reply:
        assert "content-length" not in reply.headers
        answer = json.loads(reply.read(), object_pairs_hook=without_doubles)
    for choice, row in zip(answer["choices"], rows, strict=True):
        targets = teacher.targets(np.array(row, np.uint32), Fields(k=60))
        assert_same(choice["prompt_logprobs"], plainly(row, targets, 60))


def test_a_row_of_one_token_has_only_the_null(url: str) -> None:
    assert complete(url, prompt=[7], prompt_logprobs=2)["choices"][0]["prompt_logprobs"] == [None]


def test_a_second_question_is_answered_from_the_cache(tmp_path: Path, teacher: FakeTeacher) -> None:
    keep = Keep(Cache.open(tmp_path / "c", mode="r+"), KeepPolicy(k=8))
    asked: dict[str, Any] = {"prompt": [ROW], "prompt_logprobs": 8, "max_tokens": 1}
    with serving_teachers(hosted("smol", teacher, keep)) as url:
        first = complete(url, **asked)["choices"]
        assert complete(url, **asked)["choices"] == first
        assert len(teacher.scored) == 1
        http.post(f"{url}/v1/completions", json=asked, headers={"cache-control": "no-store"})
        assert len(teacher.scored) == 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": "text"}, "there is no tokenizer here; send token ids"),
        ({"prompt": ["text"]}, "there is no tokenizer here; send token ids"),
        ({"prompt": [1, "text"]}, "there is no tokenizer here; send token ids"),
        ({}, "prompt must be a list of token ids"),
        ({"prompt": []}, "prompt must be a list of token ids"),
        ({"prompt": [[]]}, "row 0 is empty"),
        ({"prompt": [1.5]}, "prompt 0 has 1.5; a token id is a whole number"),
        ({"prompt": [[1], [True]]}, "prompt 1 has true; a token id is a whole number"),
        ({"prompt": [[1], 2]}, "prompt 1 must be a list of token ids"),
        ({"prompt": [2**32]}, "a token id is a whole number in [0, 2**32)"),
        ({"prompt": [64]}, "token id 64 is over a vocabulary of 64"),
        ({"prompt_logprobs": 65}, "k=65 is over this teacher's 64"),
        ({"prompt_logprobs": -1}, "asks for the whole vocabulary"),
        ({"prompt_logprobs": "8"}, 'prompt_logprobs is "8"; it must be a whole number'),
        ({"prompt_logprobs": None}, "set prompt_logprobs"),
        ({"max_tokens": 16}, "max_tokens is 16, but prompts are scored here and not continued; send 1"),
        ({"n": 2}, "n=2 is not done here"),
        ({"stream": True}, "send stream=false"),
        ({"return_tokens_as_token_ids": False}, "tokens are answered as ids"),
        ({"truncate_prompt_tokens": 3}, "cut the prompt before it is sent"),
        ({"temperature": -1}, "temperature is -1"),
        ({"echo": 1}, "echo is 1; it must be true or false"),
        ({"model": 7}, "model must be the name of a teacher"),
    ],
)
def test_what_is_not_done_here_is_refused_in_one_line(url: str, body: dict[str, Any], says: str) -> None:
    asked = {"prompt": ROW, "prompt_logprobs": 1, **body}
    if body == {}:
        del asked["prompt"]
    error = refusal(url, **asked)
    assert says in error["message"]
    assert error["type"] == "BadRequestError"


def test_refusals_have_the_shape_that_openai_clients_read(url: str) -> None:
    error = refusal(url, model="other", prompt=ROW, prompt_logprobs=1)
    assert error == {
        "message": "there is no teacher 'other'; known are smol",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    reply = http.post(f"{url}/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert reply.json()["error"]["message"].startswith("the body is not JSON")
    reply = http.post(f"{url}/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert reply.status_code == 415
    assert reply.json()["error"]["type"] == "UnsupportedMediaTypeError"


def test_a_teacher_is_chosen_by_the_url(teacher: FakeTeacher) -> None:
    other = FakeTeacher(fake_identity(vocab_size=100))
    with serving_teachers(hosted("smol", teacher), hosted("other", other)) as url:
        assert "set model to one of smol, other" in refusal(url, prompt=ROW, prompt_logprobs=1)["message"]
        path = "/v1/teachers/other/v1/completions"
        assert complete(url, path=path, prompt=[99], prompt_logprobs=1)["model"] == "other"
        assert "token id 99" in refusal(url, model="smol", prompt=[99], prompt_logprobs=1)["message"]
        assert "no teacher 'none'" in refusal(url, path="/v1/teachers/none/v1/completions", prompt=ROW)["message"]
        models = http.get(f"{url}/v1/teachers/other/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["other"]
        assert [model["id"] for model in http.get(f"{url}/v1/models").json()["data"]] == ["smol", "other"]
        assert http.get(f"{url}/health").status_code == 200
        assert http.get(f"{url}/v1/teachers/other/health").status_code == 200
        assert http.get(f"{url}/v1/teachers/none/health").status_code == 404


def test_a_trainer_that_takes_only_a_url_sends_its_key_in_it(tmp_path: Path, teacher: FakeTeacher) -> None:
    keys_file = tmp_path / "keys.toml"
    key = add_key(keys_file, "trl", Role.TRAINER, Quota())
    asked = {"prompt": ROW, "prompt_logprobs": 1}
    with serving(create_app(Service([hosted("smol", teacher)], access=Access(KeyRing(keys_file))))) as url:
        wait_ready(url)
        reply = http.post(f"{url}/v1/completions", json=asked)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "UnauthorizedError"
        with_key = url.replace("http://", f"http://any:{key}@")
        assert http.post(f"{with_key}/v1/completions", json=asked).status_code == 200
        assert http.get(f"{with_key}/v1/models").status_code == 200
        assert http.post(f"{url}/v1/completions", json=asked, auth=("any", "other")).status_code == 401


@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(1, 40),
    vocab_size=st.sampled_from([12, 130, 1025]),
    k=st.integers(0, 12),
)
def test_whatever_the_values_the_text_is_what_json_would_write(
    seed: int, num_tokens: int, vocab_size: int, k: int
) -> None:
    row, targets = random_targets(seed, num_tokens, max(k, 1), vocab_size)
    text = b"".join(prompt_logprobs_text(row, targets, k))
    assert b" " not in text
    clamped = Targets(
        targets.ids, targets.logprobs.clip(-9999.0), targets.log_tail, targets.label_logprob.clip(-9999.0)
    )
    assert_same(json.loads(text, object_pairs_hook=without_doubles), plainly(row.tolist(), clamped, k))
