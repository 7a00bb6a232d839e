"""A student whose layers are compiled is the student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.compiled import compile_layers
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, write_cache

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch looks at it while it compiles
def test_outputs_and_gradients_are_those_of_the_plain_layers() -> None:
    found = []
    for compiled in (False, True):
        student, _ = build_student(StudentConfig(config=STUDENT), seed=0, vocab_size=VOCAB, row_tokens=12)
        if compiled:
            compile_layers(student, CPU, backend="aot_eager")
        for rows, length in ((2, 5), (3, 8)):
            tokens = torch.arange(rows * length).reshape(rows, length) % VOCAB
            student(input_ids=tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append({name: weight.grad for name, weight in student.named_parameters()})
    plain, compiled_ones = found
    assert plain.keys() == compiled_ones.keys(), "weights keep their names"
    for name, grad in plain.items():
        torch.testing.assert_close(compiled_ones[name], grad)


def test_where_torch_cannot_compile_it_is_one_line() -> None:
    student, _ = build_student(StudentConfig(config=STUDENT), seed=0, vocab_size=VOCAB, row_tokens=12)
    with pytest.raises(InvalidInput, match=r"train\.compile is true, but torch cannot compile here: .*; leave it out$"):
        compile_layers(student, CPU, backend="none such")


def test_a_student_without_a_list_of_layers_is_refused() -> None:
    student, _ = build_student(StudentConfig(config=STUDENT), seed=0, vocab_size=VOCAB, row_tokens=12)
    student.model.layers = torch.nn.Sequential(*student.model.layers)
    with pytest.raises(InvalidInput, match="model_type 'llama' has no list of layers"):
        compile_layers(student, CPU, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_run_is_the_plain_one(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    losses = []
    for compiled in (False, True):
        out = tmp_path / f"run-{compiled}"
        train(config_of(root, out, train={"steps": 3, "compile": compiled}))
        losses.append([record["loss"] for record in read_metrics(out) if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
