"""`potstill evaluate --tasks`: the numbers of lm_eval by itself and of plain float64, and what it refuses."""

from __future__ import annotations

import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.cache.corpus.tokenizer import fingerprint, load_tokenizer
from potstill.clients.cli import main
from potstill.student_trainer.evaluate.tasks.harness import open_tasks
from potstill.student_trainer.train.loop import train
from tests.student_trainer.evaluate.tasks.question_files import arc, mmlu, truthful, write_jsonl
from tests.support.corpora import topics, write_texts
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.tiny_models import make_tiny_llama
from tests.support.tiny_runs import STUDENT, config_of, fill, write_cache

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # Of `datasets` and `lm_eval`, while they load; ours stay errors.
    pytest.mark.filterwarnings("default::DeprecationWarning:datasets", "default::DeprecationWarning:lm_eval"),
]

HARNESS = Path(lm_eval.tasks.__file__).parent
OF_MMLU = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LIKELY = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "question",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}
METRICS = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
SECOND_EMPTY = "{{['yes', 'no' if question == 'What is a name?' else '']}}"
Evaluated = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a folder of questions in all shapes."""
    folder = tmp_path_factory.mktemp("tasks")
    make_tiny_llama(folder / "model", context=1024)
    for name, rows in (("truth", truthful()), ("science", arc()), ("exam", mmlu())):
        write_jsonl(folder / "questions" / f"{name}.jsonl", rows)
    return folder


def write_task(folder: Path, name: str, questions: Path, **more: Any) -> None:
    """Write a task as a user of the harness does, by hand."""
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(questions)}}}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    folder.mkdir(exist_ok=True)
    task = {"task": name, **data, **splits, **more}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def by_itself(model: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """Run lm_eval with its own model, loaded from the folder."""
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    student = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=64)
    found = lm_eval.simple_evaluate(model=student, tasks=names, task_manager=manager, log_samples=False)
    return dict(found["results"])


def check(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """Compare every number, exactly."""
    told = {
        name: {metric: (score["value"], score["stderr"]) for metric, score in task["scores"].items()}
        for name, task in found["tasks"].items()
    }
    expected = {
        name: {
            key.removesuffix(",none"): (value, None if isinstance(error, str) else error)
            for key, value in scores.items()
            if key.endswith(",none") and "_stderr" not in key
            for error in [scores[key.replace(",", "_stderr,")]]
        }
        for name, scores in plain.items()
    }
    assert told == expected


def test_questions_have_the_scores_that_lm_eval_finds_by_itself(folder: Path, evaluated: Evaluated) -> None:
    own, questions = folder / "by-hand", folder / "questions"
    write_task(own, "truth_mc1", questions / "truth.jsonl", include=str(HARNESS / "truthfulqa/truthfulqa_mc1.yaml"))
    write_task(own, "truth_mc2", questions / "truth.jsonl", include=str(HARNESS / "truthfulqa/truthfulqa_mc2.yaml"))
    write_task(own, "science", questions / "science.jsonl", include=str(HARNESS / "arc/arc_challenge.yaml"))
    template = str(HARNESS / "mmlu/default/_default_template_yaml")
    write_task(own, "exam", questions / "exam.jsonl", include=template, description=OF_MMLU, fewshot_split="test")
    names = ["truth_mc1", "truth_mc2", "science", "exam"]
    plain = by_itself(folder / "model", own, names)
    found = evaluated(folder / "model", "--tasks", questions)
    check(found, plain)
    assert set(found["tasks"]) == set(names)
    assert found["task_notes"] == []
    assert found["lm_eval"] == lm_eval.__version__
    science = found["tasks"]["science"]
    assert (science["questions"], science["shots"], list(science["scores"])) == (6, 0, ["acc", "acc_norm"])
    assert science["scores"]["acc"]["higher_is_better"] is True


def test_mc1_and_mc2_are_what_plain_float64_finds(folder: Path, evaluated: Evaluated) -> None:
    found = evaluated(folder / "model", "--tasks", folder / "questions")["tasks"]
    prompt = jinja2.Template(_prompt_of_truthfulqa())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def logprob(question: str, answer: str) -> float:
        context = prompt.render(question=question)
        begin, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {answer}")["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(log_p[at - 1, ids[at]]) for at in range(begin, len(ids)))

    right, mass = [], []
    for row in truthful():
        mc1 = [logprob(row["question"], choice) for choice in row["mc1_targets"]["choices"]]
        right.append(float(np.argmax(mc1) == 0))
        p = np.exp([logprob(row["question"], choice) for choice in row["mc2_targets"]["choices"]])
        mass.append(float(p[np.array(row["mc2_targets"]["labels"]) == 1].sum() / p.sum()))
    for name, values in (("truth_mc1", right), ("truth_mc2", mass)):
        score = found[name]["scores"]["acc"]
        # An answer's logprob is a sum of about ten float32 ones, each off by 1e-6 of tens of nats.
        assert score["value"] == pytest.approx(np.mean(values), rel=1e-3)
        assert score["stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-3)
    assert 0.0 < np.mean(right) < 1.0, "else any model would do"


def _prompt_of_truthfulqa() -> str:
    text: str = yaml.safe_load((HARNESS / "truthfulqa/truthfulqa_mc1.yaml").read_text())["doc_to_text"]
    return text


def test_tasks_in_yaml_have_the_scores_that_lm_eval_finds_by_itself(folder: Path, evaluated: Evaluated) -> None:
    own, exam = folder / "yaml", folder / "questions" / "exam.jsonl"
    choose: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices"}
    choose |= {"doc_to_target": "answer", "fewshot_split": "test", "num_fewshot": 2}
    write_task(own, "choose", exam, **choose, metric_list=[{"metric": "acc"}])
    write_task(own, "write", exam, **WRITE)
    write_task(own, "likely", exam, **LIKELY)
    group: dict[str, Any] = {"group": "both", "task": ["choose", "write"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (own / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    (own / "draft.yaml").write_text("doc_to_text: question\n", encoding="utf-8")
    plain = by_itself(folder / "model", own, ["both", "likely"])
    found = evaluated(folder / "model", "--tasks", own)
    check(found, plain)
    assert set(found["tasks"]) == {"both", "choose", "write", "likely"}
    assert found["tasks"]["choose"]["shots"] == 2
    assert found["tasks"]["likely"]["scores"]["bits_per_byte"]["higher_is_better"] is False
    first, *others = found["task_notes"]
    assert first.startswith("'draft.yaml' defines no task of its own")
    assert any("metric acc is defined, but aggregation is not" in each for each in others)


def test_a_run_has_the_scores_that_lm_eval_finds_of_its_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: Evaluated
) -> None:
    texts = write_texts(tmp_path / "texts", topics(4))
    arguments = ["--cache", tmp_path / "cache", "--corpus", "docs", "--tokenizer", folder / "model"]
    assert main(["ingest", str(texts), *map(str, arguments), "--row-tokens", "64"]) == 0
    sha256 = fingerprint(load_tokenizer(folder / "model"))
    fake = FakeTeacher(fake_identity(vocab_size=512, tokenizer_sha256=sha256))
    fill(tmp_path / "cache", "fake", teacher=fake)
    student = {"config": {**STUDENT, "max_position_embeddings": 96}}
    changes = {"data": {"held_out": 0}, "student": student, "train": {"steps": 1, "eval_every": 1}}
    train(config_of(tmp_path / "cache", tmp_path / "run", **changes))
    capsys.readouterr()
    own = tmp_path / "by-hand"
    write_task(own, "science", folder / "questions/science.jsonl", include=str(HARNESS / "arc/arc_easy.yaml"))
    mc1 = str(HARNESS / "truthfulqa/truthfulqa_mc1.yaml")
    write_task(own, "truth", folder / "questions/truth.jsonl", include=mc1)
    plain = by_itself(tmp_path / "run" / "model", own, ["science", "truth"])
    found = evaluated(tmp_path / "run", "--tasks", own)
    check(found, plain)
    assert "held_out" not in found
    (note,) = found["task_notes"]
    assert "exceeds model's maximum length (96)" in note, "the prompt of TruthfulQA is longer"


def test_a_tokenizer_without_special_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    line = refused(capsys, tmp_path / "model", "--tasks", folder / "questions")
    assert (
        "the tokenizer names no token that begins or ends a text, which lm_eval needs for tasks; put bos_token" in line
    )


def test_a_run_whose_tokenizer_ends_no_text_is_refused_before_its_rows_are_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_of(write_cache(tmp_path, documents=20), tmp_path / "run", train={"steps": 1, "eval_every": 1}))
    line = refused(capsys, tmp_path / "run", "--tasks", folder / "questions")
    assert "ingest the text of corpus 'docs' again with --tokenizer FOLDER whose tokenizer_config.json names" in line


def test_the_table_and_the_page_show_them_and_no_other_bar_is_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("local tasks need no network"))
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "page.html"
    arguments = [str(folder / "model"), "--tasks", str(folder / "questions"), "--html", str(page)]
    assert main(["evaluate", *arguments]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == f"tasks of lm_eval {lm_eval.__version__}"
    assert lines[1].split() == ["task", "questions", "shots", "metric", "value"]
    assert [line.split()[:4] for line in lines[2:4]] == [["exam", "6", "0", "acc"], ["science", "6", "0", "acc"]]
    assert all(line.startswith("tasks: ") for line in shown.err.splitlines()), shown.err
    assert f"{sum(_requests())}/{sum(_requests())} requests" in shown.err
    text = page.read_text(encoding="utf-8")
    assert "acc by task" in text
    assert "truth_mc2" in text
    assert "What does it write?" not in text


def _requests() -> list[int]:
    mc = [len(row[name]["choices"]) for row in truthful() for name in ("mc1_targets", "mc2_targets")]
    return [*mc, *(len(row["choices"]["text"]) for row in arc()), *(len(row["choices"]) for row in mmlu())]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def test_a_model_that_gives_nan_is_not_always_right(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path / "diverged")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "diverged")
    capsys.readouterr()
    line = refused(capsys, tmp_path / "diverged", "--tasks", folder / "questions")
    assert line.endswith("the model gives NaN for an answer; its weights are damaged, or diverged")


def test_a_folder_without_a_model_is_no_name_of_the_hub(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, folder / "missing", "--tasks", folder / "questions")
    assert line.endswith("is neither the folder of a run nor of a model: there is no config.json")


def test_a_model_without_a_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "bare")
    capsys.readouterr()
    line = refused(capsys, tmp_path / "bare", "--tasks", folder / "questions")
    assert "/bare' has no tokenizer that transformers loads: " in line


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"doc_to_choice": SECOND_EMPTY}, "task 'bad' has an empty choice in question 2"),
        ({"doc_to_choice": "{{nothing}}"}, "UndefinedError: 'nothing' is undefined"),
        ({"test_split": "validation"}, "KeyError: 'validation'"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "FileNotFoundError: Unable to find"),
    ],
)
def test_a_task_that_cannot_be_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: dict[str, Any], told: str
) -> None:
    good: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_target": "answer"}
    good |= {"doc_to_choice": "choices", "metric_list": [{"metric": "acc_norm"}]}
    write_task(tmp_path / "tasks", "bad", folder / "questions" / "exam.jsonl", **good | task)
    line = refused(capsys, folder / "model", "--tasks", tmp_path / "tasks")
    assert line.startswith("invalid_input: task 'bad' ")
    assert told in line


def test_what_the_harness_warns_of_is_a_note(folder: Path, tmp_path: Path, evaluated: Evaluated) -> None:
    task: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices"}
    exam = folder / "questions" / "exam.jsonl"
    write_task(tmp_path / "tasks", "odd", exam, **task, doc_to_target="{{answer}} or so", metric_list=METRICS)
    (note,) = evaluated(folder / "model", "--tasks", tmp_path / "tasks")["task_notes"]
    assert note.startswith("lm_eval: Label index was not in within range of available choices")
    assert note.endswith(" (and 5 more)")


def test_a_template_is_compiled_once_and_only_while_tasks_are_open(folder: Path) -> None:
    def compiled() -> jinja2.Template:
        found: jinja2.Template = lm_eval.utils.env.from_string("{{question}}")
        return found

    with open_tasks(str(folder / "questions")):
        assert compiled() is compiled()
    assert compiled() is not compiled()


def test_a_folder_of_yaml_without_a_task(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "draft.yaml").write_text("doc_to_text: question\n", encoding="utf-8")
    assert "is a task of the harness: none of its *.yaml" in refused(capsys, folder / "model", "--tasks", tmp_path)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("no/such/folder", "is no folder; give one with tasks, or names of the harness's own tasks"),
        (",", "is no folder; give one with tasks, or names of the harness's own tasks"),
        ("../{folder}/qestions", "is no folder; near are '../{folder}/questions'; give one with tasks, or names of"),
        ("questionz", "there is no folder 'questionz', nor such a task of the harness; near are 'questions'"),
        ("questions/exam.jsonl", "tasks 'questions/exam.jsonl' is a file; give its folder, 'questions'"),
    ],
)
def test_what_is_neither_a_folder_nor_a_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: str, told: str
) -> None:
    monkeypatch.chdir(folder)
    line = refused(capsys, folder / "model", "--tasks", asked.format(folder=folder.name))
    assert told.format(folder=folder.name) in line
