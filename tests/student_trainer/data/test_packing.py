"""Packing changes neither what tokens see nor, but for rounding, any gradient; every worker has as many parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from potstill.cache.cache import Cache
from potstill.student_trainer.data import Batch, BatchReader
from potstill.student_trainer.data.packing import keeps_rows_apart, num_slots, plan_micro_batches
from potstill.student_trainer.data.sources import cache_source
from potstill.student_trainer.losses import Objective, distillation_loss
from potstill.student_trainer.models.distilled import Distilled
from tests.support.tiny_runs import ROW_TOKENS, STUDENT, VOCAB, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ATTENTIVE: list[dict[str, Any]] = [
    STUDENT,
    {**STUDENT, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    {**STUDENT, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 3},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    {**STUDENT, "model_type": "lokilm", "initializer_range": 0.4},
]
RECURRENT: dict[str, Any] = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reader(root: Path) -> BatchReader:
    cache = Cache.open(root)
    source = cache_source("fake", cache.targets("fake", "docs"))
    return BatchReader(cache.corpus("docs"), (source,), (1.0,), prefix=(3, 4))


def model_of(keys: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**keys, "vocab_size": VOCAB}))
    return model.eval()


@st.composite
def slices(draw: st.DrawFn) -> list[NDArray[np.int64]]:
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=50)
    return [np.array(each, dtype=np.int64) for each in draw(st.lists(lengths, min_size=1, max_size=4))]


@given(lengths=slices(), micro_batch_rows=st.integers(1, 9), pack=st.booleans())
def test_a_plan_has_every_row_once_and_as_many_parts_for_each_worker(
    lengths: list[NDArray[np.int64]], micro_batch_rows: int, pack: bool
) -> None:
    plans = plan_micro_batches(lengths, micro_batch_rows, 40, pack=pack)
    assert len({len(plan) for plan in plans}) == 1
    for plan, each in zip(plans, lengths, strict=True):
        bins = [rows for part in plan for rows in part]
        assert sorted(i for rows in bins for i in rows) == list(range(len(each)))
        assert all(len(part) <= micro_batch_rows for part in plan)
        assert all(each[rows].sum() <= 45 for rows in bins), "an eighth over the longest row"
        assert pack or all(len(rows) == 1 for rows in bins)
    assert plans == plan_micro_batches([each.copy() for each in lengths], micro_batch_rows, 40, pack=pack)


@pytest.mark.parametrize("row_tokens", [512, 2048])
def test_padding_is_under_two_percent(row_tokens: int) -> None:
    random = np.random.default_rng(0)
    documents = np.maximum(random.lognormal(6.2, 1.0, 2000).astype(np.int64), 5)
    whole = np.repeat(row_tokens, (documents // row_tokens).sum())
    lengths = random.permutation(np.concatenate([whole, documents[documents % row_tokens > 0] % row_tokens]))
    slots = {True: 0, False: 0}
    for start in range(0, 1024, 64):
        part = lengths[start : start + 64]
        for pack in slots:
            [plan] = plan_micro_batches([part], 8, row_tokens, pack=pack)
            slots[pack] += num_slots(plan, part)
    assert 1 - lengths[:1024].sum() / slots[True] < 0.02 < 1 - lengths[:1024].sum() / slots[False]


@pytest.mark.parametrize("keys", ATTENTIVE, ids=lambda keys: keys["model_type"])
def test_rows_that_share_one_get_the_logits_of_each_alone(reader: BatchReader, keys: dict[str, Any]) -> None:
    model = model_of(keys).double()
    assert keeps_rows_apart(model)
    bins = [[5, 0, 11], [7], [2, 3]]
    batch = reader.read_packed(bins)
    with torch.no_grad():
        packed = model(**batch.inputs).logits
        for i, rows in enumerate(bins):
            at = 0
            for row in rows:
                alone = reader.read([row])
                length = int(alone.lengths[0])
                there = slice(at, at + length)
                torch.testing.assert_close(packed[i, there], model(**alone.inputs).logits[0], rtol=0, atol=1e-10)
                for ours, theirs in zip(tensors(batch), tensors(alone), strict=True):
                    assert torch.equal(ours[i, there], theirs[0])
                at += length
            assert at == batch.lengths[i]
            assert not batch.mask[i, at:].any()


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    [teacher] = batch.teachers
    yield from (batch.tokens, batch.mask, batch.labels, teacher.ids, teacher.logprobs, teacher.log_tail)


def test_a_student_without_attention_is_found_out() -> None:
    model = model_of(RECURRENT).train()
    assert not keeps_rows_apart(model)
    assert model.training


def test_chunks_of_attention_are_not_those_of_rows() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_hidden_layers": 2}
    chunks = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8}
    assert not keeps_rows_apart(model_of({"model_type": "llama4_text", **sizes, **heads, **chunks}))


def test_a_student_of_few_positions_is_tried_within_them() -> None:
    model = model_of({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 4})
    assert not keeps_rows_apart(model)
    assert Distilled(model, "float32", Objective()).fused


def test_a_worker_with_fewer_rows_learns_nothing_from_an_empty_part(reader: BatchReader) -> None:
    model = model_of(STUDENT)
    batch = reader.read_packed([])
    assert batch.tokens.shape == (1, 1)
    assert (batch.num_positions, batch.num_labels, int(batch.real.sum())) == (0, 0, 0)
    add_gradient(model, batch, 10, 12)
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def add_gradient(model: PreTrainedModel, batch: Batch, num_labels: int, num_positions: int) -> None:
    loss = distillation_loss(
        model(**batch.inputs).logits,
        batch.labels,
        batch.teachers,
        alpha=0.7,
        mask=batch.mask,
        num_labels=num_labels,
        num_positions=num_positions,
    )
    loss.total.backward()  # type: ignore[no-untyped-call]


def gradient(model: PreTrainedModel) -> torch.Tensor:
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]).double()
    model.zero_grad()
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_two_workers_packed_parts_have_the_gradient_of_single_rows(reader: BatchReader, pack: bool) -> None:
    rows = np.random.default_rng(1).permutation(len(reader.corpus))[:25]
    counts = reader.measure(rows)
    model, exact = model_of(STUDENT), model_of(STUDENT).double()
    parts = np.split(rows, [12])
    lengths = np.split(counts.lengths, [12])
    plans = plan_micro_batches(lengths, 3, ROW_TOKENS + 2, pack=pack)
    assert len(plans[0]) > 2
    for part, plan in zip(parts, plans, strict=True):
        for bins in plan:
            batch = reader.read_packed([part[each].tolist() for each in bins])
            assert (batch.position_ids is not None) == any(len(each) > 1 for each in bins)
            add_gradient(model, batch, counts.num_labels, counts.num_positions)
    for row in rows:
        add_gradient(exact, reader.read([row]), counts.num_labels, counts.num_positions)
    packed, alone = gradient(model), gradient(exact)
    assert (packed - alone).abs().max() < 1e-6 * max(1.0, float(alone.abs().max()))


def test_batches_move_and_count_all_their_tensors(reader: BatchReader) -> None:
    batch = reader.read_packed([[0, 1], [2]])
    assert batch.position_ids is not None
    assert batch.num_bytes == replace(batch, position_ids=None).num_bytes + batch.position_ids.nbytes
    assert batch.to(torch.device("meta")).position_ids is not None
