"""`/v1/completions` for trainers that are made for a vLLM server: pointed here, they read the same JSON.

A prompt's logprobs come from the cache or the engine as those of `/v1/teachers/{name}/score` do, with the same
admission, limits, deadlines and metrics. The shape is that of vLLM 0.32, with these differences, because no text is
generated and there is no tokenizer here:

- `decoded_token` is null, `text` is empty, and `logprobs` names its tokens `token_id:N`, as vLLM itself does when
  it is asked for `return_tokens_as_token_ids`.
- The token after the prompt is the most probable one at any temperature, and `finish_reason` is always `length`.
- A prompt token outside the top K has rank K + 1, the least it can have; its logprob is exact.
- `prompt_logprobs` are of temperature 1 whatever `temperature` says: so are those of a vLLM server.

A trainer that asks `/v1/models` for the first model, or names none, can be given `http://host:port/v1/teachers/NAME`
as its server and then gets that teacher.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from itertools import chain
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput, UnknownTeacher
from potstill.cache.types import Fields, Targets, TeacherIdentity, Tokens
from potstill.cache.wire import scores as wire
from potstill.cache.wire.stream import in_pieces
from potstill.teacher_service.access import Role, allow
from potstill.teacher_service.admission.limits import request_format
from potstill.teacher_service.hosting import HostedTeacher, Service
from potstill.teacher_service.routes.completions.prompt_logprobs import (
    NAME_PREFIX,
    label_logprobs,
    prompt_logprobs_text,
    top_logprobs_text,
)
from potstill.teacher_service.routes.completions.request import CompletionRequest
from potstill.teacher_service.routes.score import ScoreCall, answer_call

_NAMED = "/v1/teachers/{name}"
_BUFFERED_ENTRIES = 512  # up to which an answer is sent whole, about 40 KiB; a longer one is written while it is sent
_PART = 4096
"""Items of a list that are written at once."""


def add_completion_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of an OpenAI-style server, for all teachers and below each one's own URL."""
    trainer = [Depends(allow(Role.TRAINER))]

    @app.post("/v1/completions", dependencies=trainer)
    async def completions(request: Request) -> Response:
        """Answer `prompt_logprobs` of token ids as vLLM's server does, by the teacher that `model` names."""
        return await _complete(service, request, None)

    @app.post(_NAMED + "/v1/completions", dependencies=trainer)
    async def completions_of_one(name: str, request: Request) -> Response:
        """Answer the same by the teacher of this URL, whatever `model` says."""
        return await _complete(service, request, service.teacher(name))

    @app.get("/v1/models", dependencies=trainer)
    async def models() -> dict[str, Any]:
        """List the teachers in OpenAI's shape."""
        return {"object": "list", "data": [_model(teacher) for teacher in service.teachers.values()]}

    @app.get(_NAMED + "/v1/models", dependencies=trainer)
    async def models_of_one(name: str) -> dict[str, Any]:
        """List this teacher alone, in the same shape."""
        return {"object": "list", "data": [_model(service.teacher(name))]}

    @app.get("/health")
    async def health() -> Response:
        """Say whether every teacher is up, as vLLM's server does: 200 or 503, without a body."""
        return Response(status_code=200 if service.ready else 503)

    @app.get(_NAMED + "/health")
    async def health_of_one(name: str) -> Response:
        """Say the same of this teacher."""
        return Response(status_code=200 if service.teacher(name).state == "ready" else 503)


def is_openai_path(path: str) -> bool:
    """True where callers of a path expect errors in OpenAI's shape."""
    return path.endswith("/v1/completions")


def error_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make an error answer in vLLM's shape, so that OpenAI clients show its detail."""
    # vLLM answers 400 to bad input, and OpenAI clients make another exception of each status.
    status = HTTPStatus.BAD_REQUEST.value if status == InvalidInput.status else status
    phrase = HTTPStatus(status).phrase.replace(" ", "")
    kind = phrase if phrase.endswith("Error") else f"{phrase}Error"
    error = {"message": detail, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _complete(service: Service, request: Request, teacher: HostedTeacher | None) -> Response:
    request_format(request, (wire.JSON_MEDIA_TYPE,))
    header_id = request.headers.get("x-request-id", "")[:200]  # vLLM puts it into the answer's id

    def understand(body: bytes) -> ScoreCall:
        asked = CompletionRequest.from_body(body, service.limits)
        chosen = _teacher(service, asked.model, teacher)
        answer_id = header_id or asked.request_id or uuid.uuid4().hex

        def answer(identity: TeacherIdentity, targets: list[Targets]) -> Response:
            return _answered(chosen.name, asked, answer_id, targets, identity.weights_sha256)

        return ScoreCall(chosen, asked.rows, Fields(k=asked.k), answer)

    return await answer_call(service, request, understand)


def _teacher(service: Service, model: str | None, named: HostedTeacher | None) -> HostedTeacher:
    if named is not None:
        return named
    if model is not None:
        return service.teacher(model)
    if len(service.teachers) != 1:
        raise UnknownTeacher(f"several teachers are here: set model to one of {', '.join(service.teachers)}")
    return next(iter(service.teachers.values()))


def _model(teacher: HostedTeacher) -> dict[str, Any]:
    """Make a model card in vLLM's shape; `max_model_len` counts the prompt and the one token after it."""
    ready = teacher.state == "ready"
    longest = teacher.pool.limits.max_row_tokens if ready else None
    return {
        "id": teacher.name,
        "object": "model",
        "created": 0,
        "owned_by": "potstill",
        "root": teacher.pool.identity.model if ready else None,
        "parent": None,
        "max_model_len": None if longest is None else longest + 1,
        "permission": [],
    }


def _answered(name: str, asked: CompletionRequest, answer_id: str, targets: list[Targets], weights: str) -> Response:
    text = _text(name, asked, answer_id, targets, weights)
    if sum(map(len, asked.rows)) * (asked.k + 1) <= _BUFFERED_ENTRIES:
        return Response(b"".join(text), media_type=wire.JSON_MEDIA_TYPE)
    # The JSON is nine times the arrays; text that is not written yet takes no memory.
    return StreamingResponse(in_pieces(text), media_type=wire.JSON_MEDIA_TYPE)


def _text(name: str, asked: CompletionRequest, answer_id: str, targets: list[Targets], weights: str) -> Iterator[bytes]:
    head = {"id": f"cmpl-{answer_id}", "object": "text_completion", "created": int(time.time()), "model": name}
    yield _json(head)[:-1] + b',"choices":['
    for index, (row, answer) in enumerate(zip(asked.rows, targets, strict=True)):
        yield b"," * (index > 0)
        yield from _choice(index, row, answer, asked)
    generated = asked.max_tokens * len(asked.rows)
    prompts = sum(map(len, asked.rows))
    usage = {"prompt_tokens": prompts, "total_tokens": prompts + generated, "completion_tokens": generated}
    tail = {
        "service_tier": None,
        "system_fingerprint": f"potstill-{weights[:12]}",
        "usage": {**usage, "prompt_tokens_details": None, "completion_tokens_details": None},
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    yield b"]," + _json(tail)[1:]


def _choice(index: int, row: Tokens, targets: Targets, asked: CompletionRequest) -> Iterator[bytes]:
    next_token = int(targets.ids[-1, 0])
    before = {"index": index, "text": ""}
    middle = {
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [next_token][: asked.max_tokens] if asked.return_token_ids else None,
    }
    yield _json(before)[:-1] + b',"logprobs":'
    yield from _token_logprobs(row, targets, asked)
    yield b"," + _json(middle)[1:-1] + b',"prompt_logprobs":'
    if asked.prompt_logprobs is None:
        yield b"null"
    else:
        yield from prompt_logprobs_text(row, targets, asked.prompt_logprobs)
    yield b',"prompt_token_ids":'
    yield from _list(_numbers(row)) if asked.return_token_ids else (b"null",)
    yield b',"routed_experts":null}'


def _token_logprobs(row: Tokens, targets: Targets, asked: CompletionRequest) -> Iterator[bytes]:
    """Write the `CompletionLogProbs` of the token after the prompt; with `echo` those of the prompt come before it."""
    most = asked.logprobs
    if most is None:
        yield b"null"
        return
    after = targets.ids[-1:, 0][: asked.max_tokens]
    runs = [(after, targets[len(row) - 1 :], most)]
    begin = b""
    if asked.echo:
        begin = b",null"  # nothing comes before the first token
        # One entry more than is asked for takes the place of a label that is among them.
        runs.insert(0, (row[1:], targets[: len(row) - 1], min(asked.prompt_logprobs or 0, most + 1)))
    tokens = np.concatenate([row, after]) if asked.echo else after
    own = (text for run in runs for part in label_logprobs(*run) for text in _numbers(part))
    tops = (text for run in runs for text in top_logprobs_text(*run, most))
    yield b'{"text_offset":'
    yield from _list(_numbers(_text_offsets(tokens)))
    yield b',"token_logprobs":'
    yield from _list(chain((begin,), own))
    yield b',"tokens":'
    yield from _list(_names(tokens))
    yield b',"top_logprobs":'
    yield from _list(chain((begin,), tops))
    yield b"}"


def _list(texts: Iterable[bytes]) -> Iterator[bytes]:
    """A JSON list, of texts that have a comma before each item."""
    comma = 1
    yield b"["
    for text in texts:
        yield text[comma:]
        comma = 0 if text else comma
    yield b"]"


def _numbers(array: NDArray[Any]) -> Iterator[bytes]:
    return (b"," + _json(part.tolist())[1:-1] for part in _parts(array))


def _names(tokens: Tokens) -> Iterator[bytes]:
    return ("".join(f',"{NAME_PREFIX}{token}"' for token in part.tolist()).encode() for part in _parts(tokens))


def _text_offsets(tokens: Tokens) -> NDArray[np.int64]:
    """[N] where each token's name would begin, were they written one after the other."""
    digits = np.searchsorted(10 ** np.arange(1, 10), tokens, side="right") + 1
    lengths = len(NAME_PREFIX) + digits
    offsets: NDArray[np.int64] = np.cumsum(lengths) - lengths
    return offsets


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + _PART] for start in range(0, len(array), _PART))


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
