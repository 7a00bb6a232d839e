"""Calibration and tasks in an ablation: what `potstill evaluate` says of the same students, and plain maths."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, SpecMismatch
from potstill.clients.cli import main
from potstill.student_trainer.ablate.asked import Asked, answers
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.outcome import load_outcome
from potstill.student_trainer.ablate.runs import plan_runs
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.models.corpus_tokenizer import model_tokenizer
from potstill.student_trainer.train.run import open_run
from tests.student_trainer.evaluate.tasks.question_files import write_jsonl
from tests.support.tiny_runs import STUDENT, VOCAB, write_texts_cache

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # Of `datasets` and `lm_eval`, while they load; ours stay errors.
    pytest.mark.filterwarnings("default::DeprecationWarning:datasets", "default::DeprecationWarning:lm_eval"),
]
QUESTIONS = 12
BINS = 15


def words(random: np.random.Generator, number: int) -> str:
    return " ".join(f"w{i}" for i in random.integers(1, VOCAB, number))


def science(seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    choices = [[words(random, 2) for _ in "ABC"] for _ in range(QUESTIONS)]
    return [
        {"question": words(random, 4), "choices": {"text": each, "label": list("ABC")}, "answerKey": "B"}
        for each in choices
    ]


def truth(seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    targets = [{"choices": [words(random, 2) for _ in "123"], "labels": [1, 0, 0]} for _ in range(QUESTIONS)]
    return [{"question": words(random, 4), "mc1_targets": each, "mc2_targets": each} for each in targets]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    texts = [words(random, int(random.integers(5, 31))) for _ in range(60)]
    # Tasks need a token that ends a text.
    files = {"tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"})}
    return write_texts_cache(tmp_path_factory.mktemp("cache"), texts, tokenizer_files=files)


def write_grid(root: Path, folder: Path, tasks: object) -> Path:
    (folder / "student.toml").write_text(
        f"""
        data = {{ cache = "{root}", corpus = "docs", held_out = 20 }}
        student = {{ config = {json.dumps(STUDENT).replace(":", " =")} }}
        train = {{ out = "unused", steps = 3, batch_rows = 8, lr = 1e-4, alpha = 0, eval_every = 3 }}
        """
    )
    grid = folder / "grid.toml"
    grid.write_text(
        f"""
        config = "{folder / "student.toml"}"
        out = "{folder / "ablation"}"
        baseline = "slow"
        seeds = [0, 1]
        resamples = 50
        tasks = "{tasks}"
        [cells]
        slow = {{}}
        fast = {{ train.lr = 3e-2 }}
        """
    )
    return grid


def ablated(grid: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["ablate", str(grid), "--no-ray", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def plain_calibration(student: Path, root: Path, rows: NDArray[np.int64]) -> tuple[float, float, float]:
    """Share right, calibration error and overconfidence by one forward of transformers a row, in float64."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).eval()
    corpus = Cache.open(root).corpus("docs")
    confidence, right = [], []
    for row in rows.tolist():
        tokens = torch.from_numpy(corpus.row(row).astype(np.int64))
        with torch.no_grad():
            p = model(tokens[None]).logits[0].softmax(-1)[:-1]
        confidence += p.max(-1).values.tolist()
        right += (p.argmax(-1) == tokens[1:]).tolist()
    sure, hit = np.array(confidence), np.array(right, dtype=float)
    error = 0.0
    for low in np.arange(BINS) / BINS:
        there = (sure >= low) & (sure < low + 1 / BINS)
        error += abs(hit[there].sum() - sure[there].sum())
    return hit.mean(), error / len(sure), sure.mean() - hit.mean()


def test_students_are_judged_as_evaluate_judges_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: Callable[..., dict[str, Any]]
) -> None:
    questions = tmp_path / "questions"
    write_jsonl(questions / "science.jsonl", science(1))
    write_jsonl(questions / "truth.jsonl", truth(2))
    grid = write_grid(root, tmp_path, questions)
    found = ablated(grid, capsys)
    rows = {row["cell"]: row for row in found["rows"]}
    run = tmp_path / "ablation" / "runs" / "fast"
    told = [evaluated(run / str(seed), "--tasks", questions) for seed in (0, 1)]
    scores = {"science acc", "science acc_norm", "truth_mc1 acc", "truth_mc2 acc"}
    assert {name for name in rows["fast"]["means"] if name.startswith("task ")} == {f"task {name}" for name in scores}
    for name in scores:
        task, metric = name.split()
        values = [each["tasks"][task]["scores"][metric]["value"] for each in told]
        assert rows["fast"]["means"][f"task {name}"] == pytest.approx(np.mean(values), abs=1e-12), name
        assert found["higher_is_better"][f"task {name}"] is True
        difference = rows["fast"]["differences"][f"task {name}"]
        assert difference["value"] == pytest.approx(
            rows["fast"]["means"][f"task {name}"] - rows["slow"]["means"][f"task {name}"]
        )
    assert set(found["notes"]) == set(told[0]["task_notes"]) != set(), "TruthfulQA's prompt is longer than the student"
    assert rows["fast"]["means"]["ece"] == pytest.approx(np.mean([each["ece"]["value"] for each in told]), rel=1e-12)
    with open_run(TrainConfig.from_toml(tmp_path / "student.toml")) as opened:
        held_out = opened.held_out
    plain = np.mean([plain_calibration(run / str(seed) / "model", root, held_out) for seed in (0, 1)], axis=0)
    ours = [rows["fast"]["means"][name] for name in ("top1", "ece", "overconfidence")]
    assert ours == pytest.approx(plain.tolist(), abs=1e-6)
    check_other_questions(grid, questions, found, capsys)


def check_other_questions(
    grid: Path, questions: Path, before: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Students are asked again where the questions changed, and not trained again."""
    write_jsonl(questions / "science.jsonl", science(3))
    folder = questions.parent / "ablation"
    trained = (folder / "runs/fast/0/model/model.safetensors").stat().st_mtime_ns
    (run, *_) = plan_runs(GridConfig.from_toml(grid))
    first = load_outcome(folder, "slow", 0)
    assert first is not None
    assert run.asked is not None
    assert first.asked != run.asked.fingerprint
    after = ablated(grid, capsys)
    assert after["rows"][1]["means"]["loss"] == before["rows"][1]["means"]["loss"]
    second = load_outcome(folder, "slow", 0)
    assert second is not None
    assert second.asked == run.asked.fingerprint
    assert second.measures["task truth_mc2 acc"] == first.measures["task truth_mc2 acc"]
    assert second.measures["task science acc"] != first.measures["task science acc"]
    assert (folder / "runs/fast/0/model/model.safetensors").stat().st_mtime_ns == trained


def test_questions_that_change_while_students_train_are_refused(root: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions" / "science.jsonl", science(1))
    model = AutoModelForCausalLM.from_config(_settings())
    tokenizer = model_tokenizer(model.config, Cache.open(root).corpus("docs"))
    with pytest.raises(SpecMismatch, match="were changed meanwhile; the same command judges by them as they are"):
        answers(Asked(str(tmp_path / "questions"), "before"), model, tokenizer)


def _settings() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{key: value for key, value in STUDENT.items() if key != "model_type"}, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (None, "is no folder; give one with tasks, or names of the harness's own tasks"),
        ([{"premise": "a"}], "science.jsonl' is of no known shape: its fields are premise. "),
    ],
)
def test_tasks_that_cannot_be_asked_are_named_before_the_first_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, told: str
) -> None:
    if rows is not None:
        write_jsonl(tmp_path / "questions" / "science.jsonl", rows)
    assert main(["ablate", str(write_grid(root, tmp_path, tmp_path / "questions")), "--no-ray"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "ablation").exists()


def test_an_extra_that_is_missing_is_named_before_the_first_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "potstill.student_trainer.evaluate.tasks.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["ablate", str(write_grid(root, tmp_path, "arc_easy")), "--no-ray"]) == 1
    assert 'pip install "potstill[eval]"' in capsys.readouterr().err
    assert not (tmp_path / "ablation").exists()


def test_a_tokenizer_that_ends_no_text_is_named_before_the_first_run(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    root = write_texts_cache(tmp_path, [words(random, 20) for _ in range(40)])
    with pytest.raises(InvalidInput, match="lm_eval needs for tasks; ingest the text of corpus 'docs' again"):
        plan_runs(GridConfig.from_toml(write_grid(root, tmp_path, "arc_easy")))
