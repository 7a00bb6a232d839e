"""The study's runs: a student trained as a cell says, and judged by the teacher's whole distributions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.corpora import SAMPLE, kinds_of
from benchmarks.study.plan import TEACHER, Cell, Plan
from benchmarks.study.results import ACCEPTANCE, KL, LOSS, REVERSE_KL, TOP1, Result
from benchmarks.study.teachers import Stopped
from potstill.cache import Cache
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.labels import LabelTable
from potstill.student_trainer.evaluate.measuring import measure
from potstill.student_trainer.evaluate.positions import KEPT, TEXT, WHOLE
from potstill.student_trainer.evaluate.whole_targets import whole_targets
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import load_student
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run

_NOT_OF_A_STUDENT = (
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "unk_token_id",  # which a Llama has no use for
)
_LOOKS = 2
"""Looks at the held-out rows while a run trains."""


def config_of(plan: Plan, cell: Cell, seed: int, folder: Path, model: Path) -> TrainConfig:
    """Make the config of a run."""
    steps, dense = plan.wide_steps if cell.large else plan.steps, bool(cell.train.get("dense"))
    # A row of all ids takes 150 MB while it is read, and a look at all held-out rows as long as ten steps.
    reading, looks = ({"readers": 1, "prefetch": 2}, 1) if dense else ({}, _LOOKS)
    return TrainConfig.of(
        {
            "data": {
                "cache": str(folder / "cache"),
                "corpus": SAMPLE,
                "held_out": plan.held_out,
                "held_out_seed": plan.seed,
                "window_shards": 1 << 16,  # all: rows of one kind are neighbours
                **reading,
            },
            "teachers": [dict(each) for each in cell.teachers],
            "student": _student(plan, cell, model),
            "train": {
                "out": str(folder / "runs" / f"{cell.name}-{seed}"),
                "seed": seed,
                "steps": steps,
                "batch_rows": plan.batch_rows,
                "micro_batch_rows": min(2 if dense else 4, plan.batch_rows),
                "lr": plan.wide_lr if cell.large else plan.lr,
                "warmup": steps // 10,
                "eval_every": max(1, steps // looks),
                "checkpoint_every": max(1, steps // 5),
                "keep_checkpoints": 1,
                **cell.train,
            },
        }
    )


def _student(plan: Plan, cell: Cell, model: Path) -> dict[str, Any]:
    if cell.layers:
        return {"checkpoint": str(model), "layers": list(plan.wide_layers)}
    if cell.large:
        wide: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
        kept = {name: value for name, value in wide.items() if name not in _NOT_OF_A_STUDENT}
        return {"config": {**kept, "num_hidden_layers": len(plan.wide_layers)}}
    narrow = {
        "model_type": "llama",
        "hidden_size": plan.hidden_size,
        "intermediate_size": 3 * plan.hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    return {"config": narrow}


def trained_and_judged(
    plan: Plan,
    cell: Cell,
    seed: int,
    folder: Path,
    model: Path,
    *,
    sha256: str,
    made: Mapping[str, str],
    should_stop: Callable[[], bool],
) -> Result:
    """Train a run to its end, or go on with it, and judge its student.

    Raises:
        Stopped: it was asked to stop, and has a checkpoint. PotstillError: as `train`.
    """
    config = config_of(plan, cell, seed, folder, model)
    trained = train(config, should_stop=should_stop)
    if not trained.finished:
        raise Stopped
    student = load_student(config.run_dir / "model")
    judged = _judged(config, student)
    return Result(
        plan=sha256,
        cell=cell.name,
        seed=seed,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 1),
        parameters=sum(each.numel() for each in student.parameters()),
        made=made,
        curve=_curve(config),
        **judged,
    )


def _judged(config: TrainConfig, student: Any) -> dict[str, Any]:
    """Measure a student on the held-out rows, against the first teacher whatever it learnt from."""
    plain = config.to_json()
    plain["train"] = {name: plain["train"][name] for name in ("out", "steps")}  # type: ignore[index,call-overload]
    plain["teachers"] = [{"name": TEACHER}]
    base = TrainConfig.of(plain)
    with open_run(base) as run:
        whole, problem = whole_targets(Cache.open(base.data.cache), TEACHER, run.corpora)
        assert whole is not None, problem
        sums = measure(student, run.reader, run.held_out, LabelTable.of(run.corpus.tokenizer), {TEACHER: whole})
        kinds = kinds_of(run.corpus, run.held_out)
    text, kept, of_all = (each.sum(axis=1) for each in (sums.text, sums.kept[TEACHER], sums.whole[TEACHER]))
    columns = {
        LOSS: text[:, TEXT.index("loss")],
        KL: of_all[:, WHOLE.index("full_kl")],
        REVERSE_KL: of_all[:, WHOLE.index("reverse_kl")],
        ACCEPTANCE: of_all[:, WHOLE.index("acceptance")],
        TOP1: kept[:, KEPT.index("top1")],
    }
    return {
        "kinds": kinds,
        "labels": text[:, TEXT.index("labels")].astype(int).tolist(),
        "positions": of_all[:, 0].astype(int).tolist(),
        "measures": {name: [round(value, 4) for value in sums.tolist()] for name, sums in columns.items()},
        "bins": [[round(value, 4) for value in each] for each in sums.bins.sum(axis=0).tolist()],
    }


def _curve(config: TrainConfig) -> list[list[float]]:
    """List the looks at the held-out rows: tokens of the step before, and the loss."""
    tokens, found = 0, []
    for record in read_metrics(config.run_dir):
        if "loss" in record:
            tokens = record["tokens"]
        elif "held_out" in record:
            found.append([tokens, round(record["held_out"]["ce"], 5)])
    return found
