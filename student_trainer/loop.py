"""The training loop: plain PyTorch, alone or as one of several workers.

1. The rows of step s are `order[s * batch_rows : (s + 1) * batch_rows]`; each worker takes its slice and cuts it
   into micro-batches, which a thread reads ahead.
2. Every micro-batch's loss is a sum divided by the counts of the *global* batch, known from the row lengths, so
   gradients add up: micro-batches and workers change the result by rounding only.
3. Gradients are summed over micro-batches and workers, clipped, and AdamW takes a step.
4. Now and then the student is evaluated on held-out rows, and a checkpoint is written.

Nothing but (seed, step) decides what step s does, so a run that resumes from a checkpoint on one CPU worker
continues bit for bit. When asked to stop, it finishes the step, writes a checkpoint and returns.

Shape legend:  B rows, T tokens, V vocabulary, M teachers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from cache.errors import InvalidInput
from cache.types import JSON
from student_trainer.checkpoint import (
    TrainState,
    load_model,
    load_optimizer,
    load_state,
    newest_checkpoint,
    publish_model,
    save_checkpoint,
    write_json,
)
from student_trainer.config import LoopConfig, TrainConfig
from student_trainer.data import Batch, read_ahead
from student_trainer.evaluate import Evaluation, autocast, evaluate_student
from student_trainer.group import Alone, Group
from student_trainer.loss import distillation_loss
from student_trainer.metrics import MetricsWriter, Record
from student_trainer.models import build_student
from student_trainer.order import hashed
from student_trainer.run import OpenRun, open_run, prepare_run_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    finished: bool
    """False when it was stopped; the same call goes on from `step`."""
    step: int
    tokens: int
    """Positions trained on since the start of the run."""
    seconds: float
    """Spent since the start of the run, evaluations included."""
    held_out: Evaluation | None
    """Of the final model; None without held-out rows, or when stopped."""

    def to_json(self) -> dict[str, JSON]:
        """What summary.json holds."""
        return {
            "finished": self.finished,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "held_out": None if self.held_out is None else self.held_out.to_json(),
        }


def train(
    config: TrainConfig,
    group: Group | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Record], None] = lambda _: None,
) -> TrainResult:
    """Start, continue or find finished the run in `config.train.out`. Every worker of the group calls it.

    Args:
        config: the run.
        group: the workers; this process alone by default.
        should_stop: asked after every step; when any worker's says yes, all write a checkpoint and return.
        on_record: called on rank 0 with every record of `metrics.jsonl`.

    Raises:
        SpecMismatch: the folder holds a run of another config or corpus, or a teacher does not fit.
        InvalidInput: the config asks for what cannot be, or the loss is no longer a number.
        PotstillError: whatever reading rows and targets raises.
    """
    group = group or Alone()
    config = config.absolute()
    prepare_run_dir(config, write=group.rank == 0)
    group.barrier()
    with open_run(config) as run, torch.random.fork_rng():
        session = _begin(config, group, run)
        with closing(session.writer) if session.writer else nullcontext():
            return session.run_to_end(should_stop, on_record)


def learning_rate(step: int, config: LoopConfig) -> float:
    """The rate of the optimizer step after `step` steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    falling = max(1, round(config.decay * config.steps))
    left = min(1.0, (config.steps - step) / falling)
    return config.min_lr + (config.lr - config.min_lr) * left


@dataclass(slots=True, eq=False)
class _Session:
    """One process's part of a run, from a start or resume to the end or the next stop."""

    config: TrainConfig
    group: Group
    run: OpenRun
    student: PreTrainedModel
    model: nn.Module  # the student, or a DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    writer: MetricsWriter | None  # rank 0's
    step: int
    tokens: int
    seconds: float  # of earlier sessions

    def run_to_end(
        self, should_stop: Callable[[], bool], on_record: Callable[[Record], None]
    ) -> TrainResult:
        loop, began, saved = self.config.train, time.monotonic(), self.step
        earlier = self.seconds
        reader = self.run.reader if loop.alpha > 0 else self.run.reader.without_targets()
        held_out, stopped = None, False
        if self.step == 0:
            held_out = self._evaluate(on_record)
        with read_ahead(reader, self._pieces(), self.config.data.prefetch) as batches:
            while self.step < loop.steps and not stopped:
                record, stopped = self._step(batches, should_stop)
                self.seconds = earlier + time.monotonic() - began
                self._record({**record, "seconds": round(self.seconds, 3)}, on_record)
                if self.step % loop.eval_every == 0 or self.step == loop.steps:
                    held_out = self._evaluate(on_record)
                self.seconds = earlier + time.monotonic() - began
                if stopped or self.step % loop.checkpoint_every == 0 or self.step == loop.steps:
                    self._save()
                    saved = self.step
        assert saved == self.step, "every way out of the loop writes a checkpoint"
        return self._end(held_out, on_record)

    def _end(self, held_out: Evaluation | None, on_record: Callable[[Record], None]) -> TrainResult:
        finished = self.step >= self.config.train.steps
        if finished and held_out is None:  # it was finished before: evaluate what is there
            held_out = self._evaluate(on_record)
        result = TrainResult(
            run_dir=self.config.run_dir,
            finished=finished,
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            held_out=held_out if finished else None,
        )
        if finished and self.group.rank == 0:
            publish_model(self.config.run_dir / "model", self.student)
            write_json(self.config.run_dir / "summary.json", result.to_json())
        self.group.barrier()
        return result

    def _step(self, batches: Iterator[Batch], should_stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step; what happened in it, over all workers, and whether to stop after it."""
        loop, began = self.config.train, time.monotonic()
        torch.manual_seed(int(hashed(np.array([self.step]), loop.seed, self.group.rank)[0]))  # dropout
        num_labels, num_positions = self._global_counts()
        num_pieces = len(self._rank_pieces(self.step))
        num_teachers = len(self.config.teachers) if loop.alpha > 0 else 0
        # CE, a KL per teacher, and how many workers want to stop: one reduction for all.
        sums = torch.zeros(2 + num_teachers, dtype=torch.float64, device=self.group.device)
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(num_pieces):
            with self._gradients_stay_here(last=i == num_pieces - 1):
                sums[:-1] += self._forward_backward(next(batches), num_labels, num_positions)
        sums[-1] = float(should_stop())
        self.group.all_reduce_sum(sums)
        ce_sum, *kl_sums, stop = sums.tolist()
        ce, kls = ce_sum / max(num_labels, 1), [kl / num_positions for kl in kl_sums]
        weighted = sum(w * kl for w, kl in zip(self.config.weights, kls, strict=False))
        loss = (1 - loop.alpha) * ce + loop.alpha * weighted
        if not math.isfinite(loss):
            raise InvalidInput(f"the loss is {loss} at step {self.step}: try a lower train.lr or a longer train.warmup")
        grad_norm = nn.utils.clip_grad_norm_(self.student.parameters(), loop.grad_clip)
        rate = learning_rate(self.step, loop)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.tokens += num_positions
        record: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "ce": ce,
            "kl": dict(zip((t.name for t in self.config.teachers), kls, strict=False)),
            "lr": rate,
            "grad_norm": float(grad_norm),
            "epoch": self.run.order.epoch(self.step * loop.batch_rows - 1),
            "tokens": self.tokens,
            "tokens_per_second": round(num_positions / (time.monotonic() - began), 1),
        }
        return record, stop > 0

    def _forward_backward(self, batch: Batch, num_labels: int, num_positions: int) -> Tensor:
        """Add one micro-batch's gradient; [1 + M] float64, its undivided CE and KLs."""
        batch = batch.to(self.group.device)
        # Rows are padded on the right, where a causal model's real positions never look: no attention mask.
        with autocast(self.group.device, self.config.train.dtype):
            logits = self.model(input_ids=batch.tokens, use_cache=False).logits
        loss = distillation_loss(
            logits,
            batch.labels,
            batch.teachers,
            alpha=self.config.train.alpha,
            mask=batch.mask,
            num_labels=num_labels,
            num_positions=num_positions,
        )
        # DistributedDataParallel averages over workers; the counts are global, so the sum is wanted.
        (loss.total * self.group.world_size).backward()  # type: ignore[no-untyped-call]
        return torch.cat([loss.ce_sum[None], loss.kl_sums])

    def _gradients_stay_here(self, *, last: bool) -> AbstractContextManager[None]:
        """Until the last micro-batch of a step, gradients are not sent to other workers."""
        if not last and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _global_counts(self) -> tuple[int, int]:
        """Labels and positions of the global batch of this step, from the row lengths alone."""
        rows = self.run.order.take(self.step * self.config.train.batch_rows, self.config.train.batch_rows)
        starts = self.run.corpus.row_starts
        num_positions = int((starts[rows + 1] - starts[rows]).sum())
        return num_positions - len(rows), num_positions

    def _rank_pieces(self, step: int) -> list[NDArray[np.int64]]:
        loop = self.config.train
        rows = self.run.order.rank_slice(step, loop.batch_rows, self.group.rank, self.group.world_size)
        return [rows[i : i + loop.micro_batch_rows] for i in range(0, len(rows), loop.micro_batch_rows)]

    def _pieces(self) -> Iterator[NDArray[np.int64]]:
        for step in range(self.step, self.config.train.steps):
            yield from self._rank_pieces(step)

    def _evaluate(self, on_record: Callable[[Record], None]) -> Evaluation | None:
        if not len(self.run.order.held_out):
            return None
        loop = self.config.train
        evaluation = evaluate_student(
            self.student,
            self.run.reader,
            self.run.order.held_out,
            batch_rows=loop.micro_batch_rows,
            group=self.group,
            dtype=loop.dtype,
        )
        self._record({"step": self.step, "held_out": evaluation.to_json()}, on_record)
        return evaluation

    def _record(self, record: Record, on_record: Callable[[Record], None]) -> None:
        if self.writer is not None:
            self.writer.write(record)
            on_record(record)

    def _save(self) -> None:
        loop = self.config.train
        if self.group.rank == 0:
            cursor = self.step * loop.batch_rows
            state = TrainState(
                step=self.step,
                seed=loop.seed,
                epoch=self.run.order.epoch(cursor),
                cursor=cursor,
                corpus_fingerprint=self.run.corpus.fingerprint,
                tokens=self.tokens,
                seconds=self.seconds,
            )
            folder = self.config.run_dir / "checkpoints"
            save_checkpoint(folder, self.student, self.optimizer, state, keep=loop.keep_checkpoints)
        self.group.barrier()


def _begin(config: TrainConfig, group: Group, run: OpenRun) -> _Session:
    checkpoint = newest_checkpoint(config.run_dir / "checkpoints")
    group.barrier()  # all have seen the same newest checkpoint before one writes the next
    if checkpoint is None:
        student = build_student(
            config.student, seed=config.train.seed, vocab_size=run.corpus.vocab_size, row_tokens=run.longest_row
        )
        state = None
    else:
        state = load_state(checkpoint)
        state.check_corpus(run.corpus.fingerprint)
        student = load_model(checkpoint)
    student.train()
    model = group.wrap(student)
    optimizer = _optimizer(student, config.train)
    if checkpoint is not None:
        load_optimizer(checkpoint, optimizer)
    step = 0 if state is None else state.step
    writer = None
    if group.rank == 0:
        (config.run_dir / "summary.json").unlink(missing_ok=True)
        writer = MetricsWriter(config.run_dir, step=step)
    return _Session(
        config=config,
        group=group,
        run=run,
        student=student,
        model=model,
        optimizer=optimizer,
        writer=writer,
        step=step,
        tokens=0 if state is None else state.tokens,
        seconds=0.0 if state is None else state.seconds,
    )


def _optimizer(student: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, not on norms and biases."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
