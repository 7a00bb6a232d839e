"""Operations of a step against those that torch counts, and what records and progress say of speed and memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from potstill.student_trainer.metrics.progress import showing, speed_text
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.metrics.speed import Speed
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CPU = torch.device("cpu")


def speed_of(keys: dict[str, Any], peak_flops: float | None = 1e9, workers: int = 1) -> tuple[Any, Speed]:
    config = AutoConfig.for_model(**keys, attn_implementation="eager")
    student = AutoModelForCausalLM.from_config(config)
    return student, Speed.of(student, CPU, workers=workers, dtype="float32", peak_flops=peak_flops)


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied: bool) -> None:
    keys = {**STUDENT, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "tie_word_embeddings": tied}
    student, speed = speed_of(keys)
    tokens = torch.arange(3 * 24).reshape(3, 24)
    with FlopCounterMode(display=False) as counted:
        student(input_ids=tokens, use_cache=False).logits.sum().backward()
    found = speed.measure(tokens=72, rows=3, seconds=2.0, waited=0.5)
    # Norms count as parameters, and nothing is counted for them.
    assert found["mfu"] == pytest.approx(counted.get_total_flops() / 2.0 / 1e9, rel=0.02)
    assert found["waiting_share"] == 0.25
    _, of_two = speed_of(keys, workers=2)
    assert of_two.measure(tokens=72, rows=3, seconds=2.0, waited=0.0)["mfu"] == pytest.approx(
        found["mfu"] / 2, abs=1e-4
    )


def test_where_peak_or_operations_are_not_known_no_share_is_told() -> None:
    experts = {**STUDENT, "model_type": "mixtral", "num_local_experts": 2, "vocab_size": 48}
    for _, speed in (speed_of(STUDENT, None), speed_of(experts)):
        assert "mfu" not in speed.measure(tokens=10, rows=2, seconds=1.0, waited=0.0)


def test_records_and_progress_tell_of_speed_and_memory(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    written = io.StringIO()
    config = config_of(root, tmp_path / "run", train={"steps": 2, "peak_flops": 1.0})
    with showing(2, Console(file=written)) as show:
        train(config, on_record=show)
    last = read_metrics(tmp_path / "run")[-2]
    assert 0 <= last["waiting_share"] <= 1
    assert 2**20 < last["peak_memory_bytes"] < 2**40
    assert last["mfu"] > 0
    assert f"step 2/2  loss {last['loss']:.4f}  {speed_text(last)}" in written.getvalue()


def test_speed_in_words() -> None:
    record = {"tokens_per_second": 3100.2, "waiting_share": 0.003, "peak_memory_bytes": 1288490189, "mfu": 0.414}
    assert speed_text(record) == "3,100 tokens/s, 41% MFU, 0.3% waiting, 1.2 GiB"
    del record["mfu"]
    assert speed_text(record) == "3,100 tokens/s, 0.3% waiting, 1.2 GiB"
