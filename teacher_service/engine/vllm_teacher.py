"""A teacher that vLLM runs: rows of token ids in, targets of every next-token distribution out.

    async with open_vllm_teacher("path/to/model") as teacher:
        [targets] = await teacher.score([row], Fields(k=64))

Rows go in as token ids and nothing adds BOS; tokens that a model needs in front are its `prefix_ids`. Prefix caching is
off, logprobs are raw and the head computes in float32. Importing this module is cheap: the engine's thread imports vLLM
and torch when a teacher is opened.

Verified with vLLM 0.32.0 on CPUs against a plain float32 forward; it was not run on a GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from potstill.cache.corpus.teacher_tokenizer import TeacherTokenizer
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.errors import InvalidInput, LimitExceeded, UnsupportedField
from potstill.cache.named_files import read_json_object
from potstill.cache.plurals import counted
from potstill.cache.types import CONFIG_SHA256, JSON, Fields, Targets, TeacherIdentity, TeacherLimits, Tokens
from potstill.teacher_service.capture.layout import Asked
from potstill.teacher_service.engine.adapter import Adapter
from potstill.teacher_service.engine.config_hash import config_sha256
from potstill.teacher_service.engine.model_folder import (
    checkpoint_dtype,
    model_folder,
    model_name,
    model_tokenizer,
    weights_sha256,
)
from potstill.teacher_service.engine.thread import EngineThread, Job
from potstill.teacher_service.engine.vllm_engine import EngineFacts, VllmEngine

MAX_TEMPERATURES = 16
"""Most temperatures of one request; each costs a pass over all logits."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
"""Bounds of a temperature T: a logprob times 1 / T must stay a finite, normal float32."""
MAX_ROW_BYTES = 2**28
"""Most bytes of one row's draws and dense logprobs. The engine holds those of all rows of a batch at once."""

_Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """Options of one teacher."""

    model: str
    """A model folder, a name on the Hugging Face hub, or the folder of a LoRA adapter."""
    base: str = ""
    """Base model of an adapter; empty for the one that its `adapter_config.json` names."""
    revision: str = ""
    """Revision of a model on the hub; empty for its default branch."""
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto"
    """Type of the weights. `auto` is the checkpoint's own, and float32 on a CPU without bfloat16 instructions."""
    max_top_k: _Count = 256
    """The largest `Fields.k`; the vocabulary size where that is smaller."""
    max_row_tokens: _Count | None = None
    """The longest row, in tokens. None: the model's context, or the KV cache's size, less the prefix and one."""
    prefix_ids: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    """Token ids put in front of every row, like BOS; their targets are dropped."""
    max_batch_tokens: _Count = 2048
    """Tokens of one engine step; a longer row is prefilled in chunks. Beside the model, a step of the path `sampler`
    needs the memory that `capture.worker` states. The other paths, on a GPU, need up to 10 bytes * V * this for a
    step's logits, which vLLM does not plan for."""
    gpu_memory_utilization: Annotated[float, Field(ge=0, strict=True)] = 0.9
    """The share of each GPU's memory that vLLM plans with."""
    tensor_parallel: _Count = 1
    """GPUs that share one engine."""
    attention_backend: str = "auto"
    """One of vLLM's attention backends, like `TRITON_ATTN`; `auto` is its own choice."""
    quantization: str = "none"
    """One of vLLM's quantisation methods."""
    cpu_kv_cache_gib: _Count = 1
    """KV cache on a CPU platform, GiB."""
    capture: Literal["auto", "sampler", "arrays", "public-flat"] = "auto"
    """The best capture path to take (`capture.paths`): `sampler`, `arrays` or `public-flat`; `auto` is the first."""

    @classmethod
    def from_json(cls, model: str, options: Mapping[str, JSON]) -> VllmOptions:
        """Make options of a model and a table of the other options by name.

        Raises:
            InvalidInput: an unknown name or a bad value.
        """
        known = [field.name for field in fields(cls) if field.name != "model"]
        for name in options:
            if name not in known:
                raise InvalidInput(f"a vLLM teacher has no option {name!r}; known are {', '.join(known)}")
        if not model:
            raise InvalidInput("model is empty; it must be a folder or a name on the Hugging Face hub")
        values: dict[str, Any] = dict(options)
        try:
            return cls(model=model, **values)
        except ValidationError as error:
            first = error.errors()[0]
            option, value = first["loc"][0], first["input"]
            hint = f"; write {option}=[{value}]" if first["type"] == "tuple_type" and isinstance(value, int) else ""
            raise InvalidInput(f"{option} is {value!r}: {first['msg']}{hint}") from error


class VllmTeacher:
    """A `potstill.cache.types.Teacher` on one vLLM engine; many `score` calls may run at once.

    Opened by `open`, closed by `close`; not built directly.
    """

    def __init__(
        self,
        engine: EngineThread,
        *,
        options: VllmOptions,
        facts: EngineFacts,
        identity: TeacherIdentity,
        tokenizer: TeacherTokenizer,
    ) -> None:
        self._engine = engine
        self.identity = identity
        self.tokenizer = tokenizer
        self.provenance = facts.provenance
        self._facts = facts
        self._max_top_k = min(options.max_top_k, facts.vocab_size)
        self._max_row_tokens = facts.max_model_len - len(options.prefix_ids) - 1  # without the prefix
        self.limits = TeacherLimits(max_top_k=self._max_top_k, max_row_tokens=self._max_row_tokens)

    @classmethod
    async def open(cls, options: VllmOptions) -> VllmTeacher:
        """Start an engine in a thread of its own; takes tens of seconds for a small model.

        The first teacher of a process runs in it, further ones each in a process of their own.

        Raises:
            InvalidInput: no such model, or options that vLLM does not take.
            TeacherFailed: the engine did not start.
        """
        adapter = await asyncio.to_thread(Adapter.find, options.model, options.base)
        base = options.model if adapter is None else adapter.base
        folder = await asyncio.to_thread(model_folder, base, options.revision)
        arguments = _engine_arguments(options, base, folder, adapter)
        lora = "" if adapter is None else str(adapter.folder.resolve())
        engine = EngineThread(model_name(base), partial(VllmEngine, arguments, capture=options.capture, lora=lora))
        try:
            facts = await asyncio.wrap_future(engine.start())
            _check_prefix(options, facts)
            tokenizer = await asyncio.to_thread(model_tokenizer, folder)
            described = await asyncio.to_thread(_identity, model_name(base), options, facts, folder, tokenizer)
            identity = described if adapter is None else adapter.added_to(described)
        except BaseException:
            # Also where the caller is cancelled: nobody else knows of the engine.
            await asyncio.to_thread(engine.close)
            raise
        return cls(engine, options=options, facts=facts, identity=identity, tokenizer=tokenizer)

    async def close(self) -> None:
        """Shut the engine down and wait for it; rows in flight fail with `Unavailable`. May be repeated."""
        await asyncio.to_thread(self._engine.close)

    @property
    def failure(self) -> str:
        """Reason for which the engine ended by itself, in one line; empty while it runs."""
        return self._engine.failure

    @property
    def progress(self) -> int:
        """A number that changes whenever the engine finishes a step."""
        return self._engine.num_steps

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score rows [T]: one `Targets` of T positions each. The engine batches the rows of all callers together.

        A cancelled call takes its own rows out of the engine and nobody else's.

        Raises:
            InvalidInput: an empty row, or one that is not a list of token ids.
            LimitExceeded: a row, an id, K, the temperatures or the bytes of one row's targets are over their limit.
            UnsupportedField: more than the top-k, where the capture path gives no more.
            TeacherFailed: the engine failed, or gave an answer that does not fit the request or holds a NaN.
            Unavailable: the teacher was closed, before or during the call.
        """
        self._check(want)
        prefix = list(self.identity.prefix_ids)
        asked = [
            Asked(tokens=prefix + self._checked(index, row, want), num_prefix=len(prefix), want=want)
            for index, row in enumerate(rows)
        ]
        if not asked:
            return []
        job = Job(rows=asked)
        self._engine.submit(job)
        return await asyncio.wrap_future(job.done)

    def _check(self, want: Fields) -> None:
        if strange := [each.name for each in want.asked if not each.is_asked_of_teachers]:
            raise UnsupportedField(f"no teacher answers {strange[0]}: it comes of `potstill project`; ask without it")
        if not want.only_top_k and not self._facts.gives_every_field:
            names = ", ".join(each.asked_by for each in want.beside_top_k)
            reason = self._facts.why_not_better or "as its option `capture` says"
            raise UnsupportedField(
                f"this teacher captures by {self.provenance.capture_path!r}, which gives the top-k only ({reason});"
                f" {names} is not there: ask without it"
            )
        if want.k > self._max_top_k:
            raise LimitExceeded(f"k={want.k} is over this teacher's limit of {self._max_top_k}; ask for less")
        if len(want.temperatures) > MAX_TEMPERATURES:
            raise LimitExceeded(
                f"{len(want.temperatures)} temperatures were asked for, over this teacher's limit of {MAX_TEMPERATURES}"
            )
        for t in want.temperatures:
            if not MIN_TEMPERATURE <= t <= MAX_TEMPERATURE:
                bounds = f"[{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]"
                raise LimitExceeded(f"temperature {t} is outside this teacher's limits {bounds}; ask for one inside")

    def _checked(self, index: int, row: Tokens, want: Fields) -> list[int]:
        ids = np.asarray(row)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidInput(f"row {index} is {ids.dtype} of {ids.ndim} dimensions; it must be a list of token ids")
        if not len(ids):
            raise InvalidInput(f"row {index} is empty; a row has at least one token")
        if len(ids) > self._max_row_tokens:
            raise LimitExceeded(
                f"row {index} has {counted(len(ids), 'token')}, over this teacher's limit of {self._max_row_tokens};"
                f" ingest with --row-tokens {self._max_row_tokens}"
            )
        vocab_size = self.identity.vocab_size
        strange = ids[(ids < 0) | (ids >= vocab_size)]
        if len(strange):
            raise LimitExceeded(
                f"row {index} has the token id {strange[0]}, outside the teacher's vocabulary of {vocab_size}"
            )
        # float32 of the whole vocabulary, and an int32 id with an int32 count for each draw.
        size = len(ids) * (4 * vocab_size * want.dense + 8 * min(want.draws, vocab_size))
        if size > MAX_ROW_BYTES:
            raise LimitExceeded(
                f"the dense logprobs and draws of row {index} take {size:,} bytes, over this teacher's limit of"
                f" {MAX_ROW_BYTES:,} a row; ask for shorter rows, or for fewer draws"
            )
        tokens: list[int] = ids.tolist()
        return tokens


@asynccontextmanager
async def open_vllm_teacher(spec: str, *, options: Mapping[str, JSON] | None = None) -> AsyncIterator[VllmTeacher]:
    """Open a teacher for the length of a block; the entry point `vllm` of `potstill.teachers`.

    Args:
        spec: a model folder or a name on the Hugging Face hub.
        options: the other `VllmOptions`, by name.

    Raises:
        InvalidInput: no such model, an unknown option or a bad value.
        TeacherFailed: the engine did not start.
    """
    teacher = await VllmTeacher.open(VllmOptions.from_json(spec, options or {}))
    try:
        yield teacher
    finally:
        await teacher.close()


def _engine_arguments(options: VllmOptions, base: str, folder: Path, adapter: Adapter | None) -> dict[str, Any]:
    """Keyword arguments of `vllm.EngineArgs`."""
    room = len(options.prefix_ids) + 1  # and the one token that vLLM samples, because it takes no request without
    return {
        **({} if adapter is None else adapter.engine_arguments),
        "model": base,
        "revision": options.revision or None,
        "dtype": _dtype(options, folder),
        "attention_backend": None if options.attention_backend == "auto" else options.attention_backend,
        "quantization": None if options.quantization == "none" else options.quantization,
        # With -1 vLLM takes the longest that the model and the KV cache allow.
        "max_model_len": -1 if options.max_row_tokens is None else options.max_row_tokens + room,
        "max_num_batched_tokens": options.max_batch_tokens,
        "max_num_seqs": min(128, options.max_batch_tokens),  # vLLM refuses more sequences than tokens in a step
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.cpu_kv_cache_gib << 30,
        "tensor_parallel_size": options.tensor_parallel,
        "max_logprobs": options.max_top_k,
        "logprobs_mode": "raw_logprobs",  # of the model, before temperature and penalties
        "hf_overrides": {"head_dtype": "float32"},  # bfloat16 logits of neighbours in rank are often equal
        "enable_prefix_caching": False,  # a cached prefix is not computed again, so it would have no logits
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "language_model_only": True,  # rows are text: the parts of a model that see and hear take no room
        "use_tqdm_on_load": False,
    }


def _dtype(options: VllmOptions, folder: Path) -> str:
    """The checkpoint's own type for `auto`, else the one that is asked for."""
    # vLLM's own `auto` would run a float32 checkpoint in bfloat16, which is 0.04 nats off on SmolLM2-135M.
    if options.dtype != "auto":
        return options.dtype
    return "float32" if checkpoint_dtype(folder) == "float32" else "auto"


def _check_prefix(options: VllmOptions, facts: EngineFacts) -> None:
    strange = [token for token in options.prefix_ids if token >= facts.vocab_size]
    if strange:
        raise LimitExceeded(f"prefix_ids has {strange[0]}, outside the teacher's vocabulary of {facts.vocab_size}")


def _identity(
    model: str, options: VllmOptions, facts: EngineFacts, folder: Path, tokenizer: TeacherTokenizer
) -> TeacherIdentity:
    return TeacherIdentity(
        model=model,
        revision=options.revision,
        weights_sha256=weights_sha256(folder),
        tokenizer_sha256=fingerprint(tokenizer.tokenizer),
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        head_dtype=facts.head_dtype,
        quantization=options.quantization,
        overrides={CONFIG_SHA256: config_sha256(read_json_object(folder / "config.json"))},
        prefix_ids=options.prefix_ids,
    )
