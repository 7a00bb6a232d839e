"""Loading and running of tasks in the lm-evaluation-harness. Nothing else imports it."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.api.model import CacheHook
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.evaluate.means import Measure
from potstill.student_trainer.evaluate.tasks.outcome import Score, TaskOutcome, TaskOutcomes
from potstill.student_trainer.evaluate.tasks.questions import write_tasks
from potstill.student_trainer.evaluate.tasks.said import Warnings, quiet, told

OnProgress = Callable[[int, int], None]
"""Called with the number of answered requests and of all; each choice of a question is one."""

_LOGITS = 1 << 26
"""Entries of a batch's logits: 256 MiB in float32; one row may have more."""
_MOST_ROWS = 64
_MOST_TEMPLATES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """Tasks with their questions."""

    loaded: Mapping[str, Any]
    """As `TaskManager.load` gives them."""
    warnings: Warnings
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Tell these questions, as a model is asked them, from all others: sha256 in hex.

        Raises:
            InvalidInput: a question cannot be made of its task's template.
        """
        digest = hashlib.sha256(lm_eval.__version__.encode())
        for name, task in sorted(self.loaded["tasks"].items()):
            with quiet(self.warnings), told(f"task {name!r} cannot be asked"):
                task.build_all_requests()
                _seed(task)  # or the examples that a run draws would be others
            asked = [name, list(task.aggregation()), [(each.args, each.doc) for each in task.instances]]
            digest.update(json.dumps(asked, default=str).encode())
        return digest.hexdigest()

    def means(self) -> dict[str, list[str]]:
        """Name the metrics of each task that are means over questions."""
        return {name: _means(task) for name, task in self.loaded["tasks"].items()}


@contextmanager
def _compiled_once() -> Iterator[None]:
    """Compile each template of a task once: the harness does it again for each question, for most of its time."""
    environment = lm_eval.utils.env
    before = environment.from_string
    environment.from_string = lru_cache(_MOST_TEMPLATES)(before)
    try:
        yield
    finally:
        environment.from_string = before


@contextmanager
def open_tasks(asked: str) -> Iterator[Tasks]:
    """Load tasks, whose questions lie in a temporary folder until the end.

    Args:
        asked: a folder with tasks in the harness's YAML, or with files of questions of a known shape where it has no
            YAML; else names of the harness's own tasks, groups or tags, with commas between, whose data it downloads.

    Raises:
        InvalidInput: it is neither, or a task cannot be loaded.
    """
    warnings = Warnings()
    with TemporaryDirectory() as scratch, _compiled_once():
        with quiet(warnings):
            if Path(asked).is_dir():
                manager, names, notes = _of_folder(Path(asked), Path(scratch))
            else:
                manager, names, notes = *_of_names(asked), ()
            loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name in names:
                with told(f"task {name!r} cannot be loaded with its first question"):
                    for kind, found in manager.load([name]).items():
                        loaded[kind] |= found
            for task in loaded["tasks"].values():
                _prepare(task)
        yield Tasks(loaded, warnings, notes)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, corpus: str | None) -> None:
    """Raise InvalidInput if the harness cannot use a tokenizer, as it has no special tokens.

    `corpus` names the one whose tokenizer it is, where no model brings it.
    """
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return
    way_out = "put bos_token or eos_token into the tokenizer_config.json of the model's folder"
    if corpus is not None:
        way_out = (
            f"ingest the text of corpus {corpus!r} again with --tokenizer FOLDER whose tokenizer_config.json names "
            "eos_token, and project again where targets are projected"
        )
    raise InvalidInput(
        f"the tokenizer names no token that begins or ends a text, which lm_eval needs for tasks; {way_out}"
    )


def run_tasks(
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: OnProgress = lambda *_: None,
    *,
    of_questions: bool = False,
) -> TaskOutcomes:
    """Run tasks on a model, as `lm_eval` does in its `hf` backend, without a chat template.

    Args:
        tasks: from `open_tasks`.
        model: on its device; its weights' dtype is that of the forward passes.
        tokenizer: the model's, one that `check_tokenizer` takes.
        on_progress: see there.
        of_questions: also give the values of single questions.

    Raises:
        InvalidInput: a task cannot be run, or the model gives NaN.
    """
    student = _Student(model, tokenizer)
    student.set_cache_hook(_Answers(list(tasks.loaded["tasks"].values()), on_progress))
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 -- what the harness draws from
    with quiet(tasks.warnings), torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEFAULT_OTHER_SEED)
        with told("the tasks cannot be run"):
            found = evaluate(lm=student, task_dict=tasks.loaded, log_samples=of_questions)
    means = tasks.means() if of_questions else {}
    outcomes = {name: _outcome(name, found, means.get(name, ())) for name in found["results"]}
    return TaskOutcomes(
        version=lm_eval.__version__,
        tasks={name: each for name, each in outcomes.items() if each.scores},
        notes=(*tasks.notes, *tasks.warnings.texts()),
    )


def _of_folder(folder: Path, scratch: Path) -> tuple[Any, list[str], tuple[str, ...]]:
    if not any(folder.rglob("*.yaml")):
        write_tasks(folder, scratch, Path(lm_eval.tasks.__file__).parent)
        folder = scratch
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    used = {entry.yaml_path for entry in manager.task_index.values()}
    unused = [file.relative_to(folder) for file in sorted(folder.rglob("*.yaml")) if file not in used]
    names = _not_in_groups(manager)
    if not names:
        raise InvalidInput(
            f"no file in {str(folder)!r} is a task of the harness: none of its *.yaml has a `task`, or can be read"
        )
    told = "defines no task of its own: it has no `task`, or one that another file has, or cannot be read"
    return manager, names, tuple(f"{str(file)!r} {told}" for file in unused)


def _not_in_groups(manager: Any) -> list[str]:
    """Names of all groups and tasks, without those that are in a group."""
    index, members = manager.task_index, set()
    for group in manager.all_groups:
        for member in index[group].cfg.get("task") or ():
            name = member if isinstance(member, str) else member.get("task", member.get("group"))
            members |= {name, *(index[name].tags if name in manager.all_tags else ())}
    return [name for name in (*manager.all_groups, *manager.all_subtasks) if name not in members]


def _of_names(asked: str) -> tuple[Any, list[str]]:
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if Path(asked).exists():
        raise InvalidInput(f"tasks {asked!r} is a file; give its folder, {str(Path(asked).parent)!r}")
    folders = _near_folders(asked)
    also = f"; near are {', '.join(map(repr, folders))}" if folders else ""
    if not names or any("/" in name for name in names):
        raise InvalidInput(
            f"tasks {asked!r} is no folder{also}; give one with tasks, or names of the harness's own tasks"
        )
    of_folder = f"there is no folder {asked!r}, nor such a task of the harness{also}"
    if folders and not all(map(_is_written, names)):
        raise InvalidInput(of_folder)
    manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.task_index:
            if folders:
                raise InvalidInput(of_folder)
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            also = f"; near are {', '.join(near)}" if near else ""
            raise InvalidInput(f"tasks {name!r} is neither a folder nor a task, group or tag of the harness{also}")
    return manager, names


def _is_written(name: str) -> bool:
    """Look for a name in the text of the harness's files, as a task has it there; to parse them all takes seconds."""
    files = Path(lm_eval.tasks.__file__).parent.rglob("*yaml")
    return any(name.encode() in file.read_bytes() for file in files if file.is_file())


def _near_folders(asked: str) -> list[str]:
    """Find folders whose names are like that of one that is not there."""
    beside = Path(asked).parent
    there = [each.name for each in beside.iterdir() if each.is_dir()] if beside.is_dir() else []
    return [str(beside / name) for name in difflib.get_close_matches(Path(asked).name, there)]


def _prepare(task: Any) -> None:
    """Set what `simple_evaluate` sets, and look at the choices.

    Raises:
        InvalidInput: a choice is empty.
    """
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    _seed(task)
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return
    with told(f"task {task.task_name!r} has a question of another kind than its first"):
        for number, question in enumerate(task.eval_docs, 1):
            if not all(task.doc_to_choice(question)):
                raise InvalidInput(
                    f"task {task.task_name!r} has an empty choice in question {number:,}: it has no tokens to score, "
                    "and acc_norm divides by its length; take it out"
                )


def _seed(task: Any) -> None:
    """Begin again to draw examples."""
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _means(task: Any) -> list[str]:
    return [metric for metric, aggregation in task.aggregation().items() if aggregation is mean]


def _outcome(name: str, found: Mapping[str, Any], means: Collection[str]) -> TaskOutcome:
    entry, scores, of_questions = found["results"][name], {}, {}
    for key, value in entry.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        error = entry.get(f"{metric}_stderr,{way}")
        measure = Measure(float(value), float(error) if isinstance(error, int | float | np.number) else None)
        better = found["higher_is_better"].get(name, {}).get(metric)
        told_as = metric if way == "none" else f"{metric} ({way})"
        scores[told_as] = Score(measure=measure, higher_is_better=better)
        if metric in means:
            of_questions[told_as] = [float(one[metric]) for one in found["samples"][name] if one["filter"] == way]
    counts = found["n-samples"].get(name)
    return TaskOutcome(
        questions=None if counts is None else counts["effective"],
        shots=found["n-shot"].get(name),
        scores=scores,
        of_questions=of_questions,
    )


class _Student(HFLM):  # type: ignore[misc]  # it has no types
    """The harness's model, in batches of bounded logits."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        logger = logging.getLogger(HFLM.__module__)
        before = logger.level
        # It warns that a loaded model cannot be started in parallel, which ours is not to be.
        logger.setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer)
        logger.setLevel(before)
        self.batch_size_per_gpu = self._rows(self.max_length)

    def _rows(self, tokens: int) -> int:
        entries: int = min(tokens, self.max_length) * self.config.get_text_config().vocab_size
        return max(1, min(_MOST_ROWS, _LOGITS // entries))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 -- the harness's
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        before = self.batch_size_per_gpu
        self.batch_size_per_gpu = self._rows(max(len(begin) + len(end) for _, begin, end in requests))
        try:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        finally:
            self.batch_size_per_gpu = before


class _Answers(CacheHook):  # type: ignore[misc]  # it has no types
    """Counts the answers that the harness would keep, and refuses NaN."""

    def __init__(self, tasks: list[Any], on_progress: OnProgress) -> None:
        super().__init__(None)
        self._tasks = tasks
        self._on_progress = on_progress
        self._done = self._all = 0

    def add_partial(self, attr: str, req: Iterable[Any], res: object) -> None:  # noqa: ARG002 -- the harness's
        # Requests are made when all tasks are loaded, and before the first is answered.
        self._all = self._all or sum(each.repeats for task in self._tasks for each in task.instances)
        logprob = res[0] if isinstance(res, tuple) else res
        # The harness takes NaN for the likeliest: such a model would be right wherever the first choice is.
        if isinstance(logprob, float) and math.isnan(logprob):
            raise InvalidInput("the model gives NaN for an answer; its weights are damaged, or diverged")
        self._done += 1
        self._on_progress(self._done, self._all)
