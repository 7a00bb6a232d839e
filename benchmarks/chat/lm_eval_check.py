"""A student's folder in lm_eval's `hf` backend, on a task of this machine, against `transformers`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.chat.conversations import Message
from benchmarks.chat.transformers_checks import Loaded, greedy, prompt_ids

CHOICES = 4
BOUND = 1e-3
"""Nats of a whole answer; two orders of float32 sums."""
LIMIT = 16
"""Tokens of a generated answer."""

_CHOOSE = """\
task: potstill_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
_ANSWER = """\
task: potstill_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: {limit}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def in_lm_eval(python: Path, folder: Path, student: Loaded, talks: list[list[Message]], work: Path) -> str:
    """Let an interpreter that has lm_eval choose and write answers; compare them with those of `transformers`."""
    _write_tasks(talks, work)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(work / "tasks")]
    command += ["--tasks", "potstill_choose", "potstill_answer", "--apply_chat_template", "--log_samples"]
    done = subprocess.run(
        [*command, "--output_path", str(work / "results")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((work / "results").rglob("results_*.json")).read_text())["results"]
    accuracy = results["potstill_choose"]["acc,none"]
    worst = max(_distance(sample, student) for sample in _samples(work, "choose"))
    assert worst <= BOUND, worst
    written = [_same_answer(sample, student) for sample in _samples(work, "answer")]
    return (
        f"{accuracy:.3f} of {len(talks)} questions chosen right among {CHOICES}, logprobs of answers at most "
        f"{worst:.1e} nats from transformers'; {sum(written)} of {len(written)} written answers the same"
    )


def _write_tasks(talks: list[list[Message]], work: Path) -> None:
    data = work / "questions.jsonl"
    texts = [(talk[0]["content"], talk[1]["content"]) for talk in talks]
    lines = []
    for at, (question, answer) in enumerate(texts):
        choices = [texts[(at + step - at % CHOICES) % len(texts)][1] for step in range(CHOICES)]
        lines.append({"question": question, "answer": answer, "choices": choices, "right": at % CHOICES})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (work / "tasks").mkdir()
    for name, task in (("choose", _CHOOSE), ("answer", _ANSWER)):
        (work / "tasks" / f"{name}.yaml").write_text(task.format(data=json.dumps(str(data)), limit=LIMIT))


def _samples(work: Path, task: str) -> list[dict[str, Any]]:
    file = next((work / "results").rglob(f"samples_potstill_{task}_*.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def _distance(sample: dict[str, Any], student: Loaded) -> float:
    """Largest difference, in nats, of the answers' logprobs to those of one row at a time."""
    tokenizer, model = student
    worst = 0.0
    for asked, answered in zip(sample["arguments"].values(), sample["resps"], strict=True):
        context, answer = asked["arg_0"], asked["arg_1"]
        expected = prompt_ids(tokenizer, [{"role": "user", "content": sample["doc"]["question"]}])
        assert tokenizer(context)["input_ids"] == expected, "lm_eval wrote another prompt"
        # lm_eval counts white space at the end of a prompt to the answer.
        begin, ids = len(tokenizer(context.rstrip())["input_ids"]), tokenizer(context + answer)["input_ids"]
        with torch.no_grad():
            dense = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        mine = sum(float(dense[at - 1, ids[at]]) for at in range(begin, len(ids)))
        worst = max(worst, abs(mine - float(answered[0][0])))
    return worst


def _same_answer(sample: dict[str, Any], student: Loaded) -> bool:
    tokenizer = student[0]
    ids = prompt_ids(tokenizer, [{"role": "user", "content": sample["doc"]["question"]}])
    expected: str = tokenizer.decode(greedy(student, ids, LIMIT), skip_special_tokens=True)
    return bool(sample["resps"][0][0].strip() == expected.strip())
