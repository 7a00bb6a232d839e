"""Whole small runs in this process: real files, real models, real steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from potstill.cache.cache import Cache
from potstill.cache.errors import (
    FormatError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    SpecMismatch,
    StoreError,
    Unavailable,
)
from potstill.student_trainer.checkpoint.folders import newest_checkpoint
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import only_trainer
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.evaluate.result import HELD_OUT, TrainResult
from potstill.student_trainer.evaluate.student import evaluate_student
from potstill.student_trainer.metrics.records import MetricsFollower, Record, read_metrics
from potstill.student_trainer.models.build import build_student, load_student
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import evaluate_run
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, fake_teacher, fill, unhashed, without_times, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), teachers=("fake", "second"))


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def train_stopping_at(config: TrainConfig, step: int) -> TrainResult:
    """Train as if somebody asked to stop during this session's step `step`."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == step

    return train(config, should_stop=should_stop)


def test_a_run_learns_and_leaves_everything_it_promised(root: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shown: list[Record] = []
    config = config_of(root, tmp_path / "run", train={"steps": 30, "eval_every": 10})
    result = train(config, on_record=shown.append)
    assert result.finished
    assert result.held_out is not None
    run = tmp_path / "run"
    records = read_metrics(run)
    assert shown == records
    held_out = [record["held_out"] for record in records if "held_out" in record]
    assert [record["step"] for record in records if "held_out" in record] == [0, 10, 20, 30]
    assert held_out[-1]["teachers"]["fake"]["kl"] < held_out[0]["teachers"]["fake"]["kl"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out"] == held_out[-1] == result.held_out.to_json()
    assert summary["tokens"] == result.tokens == records[-2]["tokens"]
    assert list((run / "tensorboard").iterdir())
    assert TrainConfig.of(json.loads((run / "config.json").read_text())) == config
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.hidden_size == STUDENT["hidden_size"]
    assert model.config.vocab_size == VOCAB
    assert evaluate_run(run) == {HELD_OUT: result.held_out}
    assert train(config) == result, "a finished run is found, not repeated"
    assert read_metrics(run) == records


def test_held_out_numbers_are_those_of_a_plain_computation(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run")
    model = build_student(config.student, seed=3, vocab_size=VOCAB, row_tokens=12)[0].eval()
    corpus = Cache.open(root).corpus("docs")
    rows = [4, 17, 40]
    ce, agreed, labels, positions = 0.0, 0, 0, 0
    for row in (corpus.row(i) for i in rows):
        with torch.no_grad():
            log_p = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].log_softmax(-1)
        ce -= log_p[:-1].gather(-1, torch.from_numpy(row[1:].astype(np.int64))[:, None]).sum().item()
        best = fake_teacher().dense_logprobs(row).argmax(-1)
        agreed += int((log_p.argmax(-1).numpy() == best).sum())
        labels, positions = labels + len(row) - 1, positions + len(row)
    from potstill.student_trainer.data.sources import cache_source

    source = cache_source("fake", Cache.open(root).targets("fake", "docs"))
    found = evaluate_student(model, BatchReader(corpus, (source,), (1.0,)), rows, batch_rows=2)
    assert found.rows == 3
    assert found.tokens == positions
    assert found.ce == pytest.approx(ce / labels, rel=1e-5)
    assert found.teachers["fake"].top1_agreement == pytest.approx(agreed / positions)
    assert 0 < found.teachers["fake"].student_mass_on_top_k < 1


def test_a_resumed_run_is_bit_for_bit_the_straight_one(root: Path, tmp_path: Path) -> None:
    dropout = {"student": {"config": {**STUDENT, "attention_dropout": 0.2}}}
    straight, resumed = (config_of(root, tmp_path / name, **dropout) for name in ("straight", "resumed"))
    train(straight)
    first = train_stopping_at(resumed, 5)
    assert (first.finished, first.step, first.held_out) == (False, 5, None)
    assert not (tmp_path / "resumed" / "summary.json").exists()
    second = train(resumed)
    assert (second.finished, second.step) == (True, 10)
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")
    assert without_times(read_metrics(tmp_path / "straight")) == without_times(read_metrics(tmp_path / "resumed"))


def test_steps_after_the_checkpoint_are_taken_again(root: Path, tmp_path: Path) -> None:
    """As after a crash: step 8 is recorded, but the newest complete checkpoint is of step 5."""
    import shutil

    config = config_of(root, tmp_path / "run")
    train_stopping_at(config, 8)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000008" / ".complete").unlink()
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000005"
    (checkpoints / ".partial-step-00000009").mkdir()
    train(config)
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, 11))
    straight = config_of(root, tmp_path / "straight")
    train(straight)
    assert same_weights(tmp_path / "run", tmp_path / "straight")
    shutil.rmtree(checkpoints)


def test_micro_batches_do_not_change_the_result(root: Path, tmp_path: Path) -> None:
    for size in (1, 8):
        train(config_of(root, tmp_path / str(size), train={"micro_batch_rows": size, "steps": 5}))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "8"), rtol=0, atol=1e-5)


def test_plain_cross_entropy_shares_rows_and_initial_weights(root: Path, tmp_path: Path) -> None:
    distilled = config_of(root, tmp_path / "kd", train={"steps": 2})
    plain = config_of(root, tmp_path / "ce", teachers=[], train={"alpha": 0.0, "steps": 2})
    train(distilled)
    train(plain)
    ours, theirs = (read_metrics(tmp_path / name) for name in ("kd", "ce"))
    assert ours[0]["held_out"]["ce"] == theirs[0]["held_out"]["ce"], "the same weights before step 1"
    # With teachers the log-sum-exp is taken apart at their ids: the same to the last digits of float32.
    assert ours[1]["ce"] == pytest.approx(theirs[1]["ce"], rel=1e-6), "the same rows in step 1"
    assert ours[2]["ce"] != theirs[2]["ce"]
    assert theirs[1]["kl"] == theirs[0]["held_out"]["teachers"] == {}
    assert theirs[1]["loss"] == theirs[1]["ce"]


def test_teachers_of_plain_cross_entropy_are_measured_only(root: Path, tmp_path: Path) -> None:
    measured = config_of(root, tmp_path / "measured", train={"alpha": 0.0, "steps": 4})
    plain = config_of(root, tmp_path / "plain", teachers=[], train={"alpha": 0.0, "steps": 4})
    result = train(measured)
    train(plain)
    assert same_weights(tmp_path / "measured", tmp_path / "plain")
    assert result.held_out is not None
    assert result.held_out.teachers["fake"].kl > 0


def test_several_teachers_and_bfloat16(root: Path, tmp_path: Path) -> None:
    teachers = [{"name": "fake", "weight": 3.0}, {"name": "second", "weight": 1.0, "k": 2}]
    config = config_of(root, tmp_path / "run", teachers=teachers, train={"dtype": "bfloat16", "steps": 3})
    result = train(config)
    record = read_metrics(tmp_path / "run")[1]
    expected = 0.5 * record["ce"] + 0.5 * (0.75 * record["kl"]["fake"] + 0.25 * record["kl"]["second"])
    assert record["loss"] == pytest.approx(expected)
    assert result.held_out is not None
    assert set(result.held_out.teachers) == {"fake", "second"}
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_a_running_service_teaches_like_the_cache(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "cached", train={"steps": 3}))
    with serving_teachers(hosted("fake", fake_teacher())) as url:
        teachers = [{"name": "fake", "source": "service", "url": url, "k": 8}]
        train(config_of(root, tmp_path / "served", teachers=teachers, train={"steps": 3}))
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "served"), atol=1e-4)


def test_a_student_continues_from_a_checkpoint(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "first", train={"steps": 2}))
    checkpoint = {"config": None, "checkpoint": str(tmp_path / "first" / "model")}
    train(config_of(root, tmp_path / "next", student=checkpoint, train={"steps": 1}))
    last, first = read_metrics(tmp_path / "first")[-1], read_metrics(tmp_path / "next")[0]
    assert first["held_out"] == last["held_out"]


def test_a_student_of_some_layers_resumes_and_is_published_with_them(root: Path, tmp_path: Path) -> None:
    larger = {"config": {**STUDENT, "num_hidden_layers": 3}}
    train(config_of(root, tmp_path / "larger", student=larger, train={"steps": 1}))
    layers = {"config": None, "checkpoint": str(tmp_path / "larger" / "model"), "layers": [0, 2]}
    loop = {"steps": 4}
    straight, resumed = (
        config_of(root, tmp_path / name, student=layers, train=loop) for name in ("straight", "resumed")
    )
    train(straight)
    train_stopping_at(resumed, 2)
    train(resumed)
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")
    assert load_student(tmp_path / "straight" / "model").config.num_hidden_layers == 2


@pytest.mark.slow
def test_tied_embeddings_survive_a_resume(root: Path, tmp_path: Path) -> None:
    tied = {"student": {"config": {**STUDENT, "tie_word_embeddings": True}}}
    straight, resumed = (config_of(root, tmp_path / name, **tied) for name in ("straight", "resumed"))
    train(straight)
    train_stopping_at(resumed, 4)
    train(resumed)
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_no_held_out_rows(root: Path, tmp_path: Path) -> None:
    result = train(config_of(root, tmp_path / "run", data={"held_out": 0}, train={"steps": 2}))
    assert result.finished
    assert result.held_out is None


def test_a_longer_run_goes_on_from_a_finished_one(root: Path, tmp_path: Path) -> None:
    constant = {"schedule": "constant"}
    train(config_of(root, tmp_path / "run", train={**constant, "steps": 4}))
    result = train(config_of(root, tmp_path / "run", train={**constant, "steps": 6}))
    assert result.step == 6
    train(config_of(root, tmp_path / "straight", train={**constant, "steps": 6}))
    assert same_weights(tmp_path / "run", tmp_path / "straight")


def test_another_config_in_the_same_folder_is_refused(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "run", train={"steps": 1}))
    with pytest.raises(SpecMismatch, match=r"train\.lr"):
        train(config_of(root, tmp_path / "run", train={"steps": 2, "lr": 1.0}))


def test_another_corpus_under_the_same_name_is_refused(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "run", train={"steps": 1}))
    other = write_cache(tmp_path / "other", seed=1)
    with pytest.raises(SpecMismatch, match=r"the corpora have the fingerprint"):
        train(config_of(other, tmp_path / "run", train={"steps": 2}))


def test_other_targets_of_the_same_teacher_are_refused(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "run", train={"steps": 1}))
    coarser = write_cache(tmp_path / "coarser", teachers=())
    fill(coarser, "fake", encoding="u8")
    with pytest.raises(SpecMismatch, match="have k=8, encoding u8, but the run was started with k=8, encoding f32"):
        train(config_of(coarser, tmp_path / "run", train={"steps": 2}))


def test_fewer_steps_than_were_taken_are_refused(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "run", train={"steps": 3}))
    with pytest.raises(InvalidInput, match="train.steps is 2, but the run in .* has taken 3"):
        train(config_of(root, tmp_path / "run", train={"steps": 2}))


def test_a_config_that_cannot_begin_leaves_its_folder_free(root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        train(config_of(root, tmp_path / "run", data={"corpus": "dics"}, train={"steps": 1}))
    assert train(config_of(root, tmp_path / "run", train={"steps": 1})).finished


def test_another_teacher_under_the_same_name_is_refused(root: Path, tmp_path: Path) -> None:
    # A name that the cache has no targets of, which would be refused before.
    def taught_by(url: str, steps: int) -> TrainConfig:
        teachers = [{"name": "asked", "source": "service", "url": url, "k": 8}]
        return config_of(root, tmp_path / "run", teachers=teachers, train={"steps": steps})

    teacher = fake_teacher()
    with serving_teachers(hosted("asked", teacher)) as url:
        train(taught_by(url, 1))
    with serving_teachers(hosted("asked", FakeTeacher(replace(teacher.identity, model="of another folder")))) as url:
        assert train(taught_by(url, 2)).finished
    with (
        serving_teachers(hosted("asked", fake_teacher("another"))) as url,
        pytest.raises(SpecMismatch, match="teacher 'asked' is not the one .* weights_sha256: "),
    ):
        train(taught_by(url, 3))


def test_two_trainers_in_one_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.student_trainer.config.run_folder._LOCK_SECONDS", 0.2)
    config = config_of(root, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with only_trainer(tmp_path / "run"), pytest.raises(Unavailable, match="another process is training"):
        train(config)


def test_a_diverging_run_says_so_and_keeps_its_checkpoint(root: Path, tmp_path: Path) -> None:
    wild = {"lr": 1e18, "schedule": "constant", "warmup": 0, "checkpoint_every": 1, "weight_decay": 0.0}
    config = config_of(root, tmp_path / "run", train=wild)
    with pytest.raises(InvalidInput, match=r"at step \d+ the loss is .* lower train\.lr"):
        train(config)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        (
            {**STUDENT, "vocab_size": VOCAB - 1},
            InvalidInput,
            f"vocab_size is {VOCAB - 1}; .* has {VOCAB} ids",
        ),
        ({**STUDENT, "max_position_embeddings": 4}, LimitExceeded, "max_position_embeddings is 4"),
        ({**STUDENT, "model_type": "no_such"}, InvalidInput, "student cannot be built"),
        ({**STUDENT, "num_attention_heads": 5}, InvalidInput, "student cannot be built"),
        ({**STUDENT, "hidden_sise": 64}, InvalidInput, "has no key 'hidden_sise'"),
        ("/no/such/folder", InvalidInput, "student cannot be built"),
    ],
)
def test_a_student_that_cannot_be(root: Path, tmp_path: Path, student: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        train(config_of(root, tmp_path / "run", student={"config": student}))


def test_a_folder_that_cannot_be_made(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"train\.out"):
        train(config_of(root, tmp_path / "file" / "run"))


def test_a_checkpoint_that_would_run_code_is_refused(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run")
    train_stopping_at(config, 2)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    torch.save({"state": Path("/")}, unhashed(checkpoint) / "optimizer.pt")
    with pytest.raises(FormatError, match="holds more than tensors"):
        train(config)
    (checkpoint / "optimizer.pt").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=r"optimizer\.pt"):
        train(config)


def test_old_checkpoints_go(root: Path, tmp_path: Path) -> None:
    train(config_of(root, tmp_path / "run", train={"checkpoint_every": 2, "keep_checkpoints": 3}))
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000008", "step-00000010"]


def test_evaluating_what_is_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no run"):
        evaluate_run(tmp_path)
    config = config_of(root, tmp_path / "run")
    train_stopping_at(config, 3)
    assert evaluate_run(tmp_path / "run")[HELD_OUT].rows == 8, "the newest checkpoint of an unfinished run"


def test_following_a_file_that_another_process_writes(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(tmp_path, after_step=2)
    assert follower.read() == []
    file.write_text('{"step": 2, "loss": 1}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert [record["step"] for record in follower.read()] == [3]
    file.write_text('{"step": 2, "loss": 1}\n{"step": 3, "loss": 1}\n{"step": 4, "loss": 1}\n')
    assert [record["step"] for record in follower.read()] == [4]
    replaced = tmp_path / "new"
    replaced.write_text('{"step": 3, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 5, "loss": 1}\n')
    replaced.replace(file)
    assert [record["step"] for record in follower.read()] == [5]
