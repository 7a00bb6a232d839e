"""`/v1/corpora`: what is committed, read over HTTP."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from cache import wire
from cache.errors import InvalidInput, LimitExceeded, UnknownCorpus
from cache.types import JSON, Fields
from teacher_service.admission import answer_format
from teacher_service.answers import targets_response
from teacher_service.service import Service

if TYPE_CHECKING:
    from cache.cache import Cache
    from cache.targets import TargetSet


def add_corpus_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""
    cache = service.cache

    # Opened sets stay open: a reader of many ranges pays for the metadata once.
    @lru_cache(maxsize=64)
    def open_targets(teacher: str, corpus: str) -> TargetSet:
        if cache is None:
            raise UnknownCorpus("this service has no cache; start it with --cache")
        return cache.targets(teacher, corpus).top_k_only()

    @app.get("/v1/corpora")
    async def list_corpora() -> dict[str, Any]:
        return {"corpora": [] if cache is None else await asyncio.to_thread(_describe_corpora, cache)}

    @app.get("/v1/corpora/{corpus}/targets/{teacher}")
    async def read_targets(
        corpus: str,
        teacher: str,
        request: Request,
        start: Annotated[int, Query(ge=0)],
        stop: Annotated[int, Query(ge=0)],
    ) -> Response:
        writes = answer_format(request, wire.ARROW_MEDIA_TYPE)
        bound = service.limits.max_range_positions
        if stop <= start:
            raise InvalidInput(f"stop={stop} is not after start={start}")
        if stop - start > bound:
            raise LimitExceeded(f"{stop - start} positions are over max_range_positions={bound}; read fewer")
        with service.admission.request():
            return await asyncio.to_thread(lambda: _read_range(open_targets(teacher, corpus), (start, stop), writes))


def _describe_corpora(cache: Cache) -> list[dict[str, JSON]]:
    described: list[dict[str, JSON]] = []
    for name in cache.corpora():
        corpus = cache.corpus(name)
        described.append(
            {
                "name": name,
                "rows": len(corpus),
                "positions": corpus.num_positions,
                "shards": corpus.num_shards,
                "tokenizer_sha256": corpus.tokenizer_sha256,
                "teachers": list(cache.teachers(name)),
            }
        )
    return described


def _read_range(target_set: TargetSet, positions: tuple[int, int], writes: str) -> Response:
    targets = target_set.read(*positions)
    return targets_response(wire.ScoreAnswer(target_set.identity, [targets]), Fields(k=targets.k), writes)
