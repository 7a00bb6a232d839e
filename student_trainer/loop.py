"""The training loop: plain PyTorch, alone or as one of several workers.

1. The rows of step s are `order.take(s * batch_rows, batch_rows)`; each worker takes its slice and cuts it
   into micro-batches, which a thread reads ahead.
2. Every micro-batch's loss is a sum divided by the counts of the *global* batch, known before it is read, so
   gradients add up: micro-batches and workers change the result by rounding only.
3. Gradients are summed over micro-batches and workers, clipped, and AdamW takes a step.
4. Now and then the student is evaluated on held-out rows, and a checkpoint is written.

Nothing but (seed, step) decides what step s does, so a run that resumes from a checkpoint on one CPU worker
continues bit for bit. When asked to stop, it finishes the step, writes a checkpoint and returns.

Shape legend:  B rows, T tokens, V vocabulary, M teachers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from potstill.cache.errors import InvalidInput, PotstillError, Unavailable
from potstill.cache.targets.stream import read_ahead
from potstill.clients.patience import Patience, has_no_answer
from potstill.student_trainer.checkpoint import (
    TrainState,
    load_optimizer,
    load_state,
    newest_checkpoint,
    publish_model,
    save_checkpoint,
)
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.corpus_tokenizer import special_ids
from potstill.student_trainer.data import Batch
from potstill.student_trainer.data.order import hashed
from potstill.student_trainer.evaluate import autocast, evaluate_student
from potstill.student_trainer.group import Group
from potstill.student_trainer.losses import distillation_loss
from potstill.student_trainer.metrics import MetricsWriter, Record
from potstill.student_trainer.models import build_student, load_student
from potstill.student_trainer.models.router import RouterLoss, router_loss_of
from potstill.student_trainer.optimizer import learning_rate, make_optimizer, warn_of_jump
from potstill.student_trainer.result import (
    HELD_OUT,
    SUMMARY,
    Evaluation,
    TrainResult,
    evaluations_to_json,
    finished_before,
)
from potstill.student_trainer.run import OpenRun, only_trainer, open_run
from potstill.student_trainer.run_folder import write_json

_CLOSE_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    group: Group | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Record], None] = lambda _: None,
) -> TrainResult:
    """Start, continue or find finished the run in `config.train.out`; every worker of the group calls it.

    Args:
        config: the run.
        group: the workers; this process alone by default.
        should_stop: asked after every step; when any worker's says yes, all write a checkpoint and return.
        on_record: called on rank 0 with every record of `metrics.jsonl`.

    Raises:
        SpecMismatch: the folder holds a run of another config, corpus or teacher, or a teacher does not fit.
        InvalidInput: the config asks for what cannot be, or the loss is no longer a number.
        Unavailable: another process is training in the same folder; or a service did not answer for `data.patience`
            seconds, and a checkpoint was written, from which the same call goes on.
        PotstillError: whatever reading rows and targets raises.
    """
    group = group or Group()
    if group.rank == 0:
        warn_of_jump(config)
    result = run_session(config, group, should_stop=should_stop, on_record=on_record)
    if result.problem:
        raise Unavailable(result.problem)
    return result


def run_session(
    config: TrainConfig,
    group: Group,
    *,
    should_stop: Callable[[], bool],
    on_record: Callable[[Record], None] = lambda _: None,
) -> TrainResult:
    """Train like `train`, but return a result with a `problem` where a service does not answer."""
    config = config.absolute()
    finished = finished_before(config)
    if finished is not None:
        return finished
    with ExitStack() as stack:
        patience = Patience(config.data.patience, _LOG.warning, given_up=should_stop)
        run = stack.enter_context(open_run(config)).patient(patience)
        if group.rank == 0:
            stack.enter_context(only_trainer(config.run_dir))
        group.barrier()  # the folder is ours before anybody reads a checkpoint from it
        # Dropout draws from torch's global stream, which is the caller's again afterwards.
        stack.enter_context(torch.random.fork_rng([group.device] if group.device.type == "cuda" else []))
        session = _Session(config, group, run, on_record)
        if session.writer is not None:
            stack.enter_context(closing(session.writer))
            # Only now that all it needs is there: a folder with a config.json refuses any other run.
            write_json(config.run_dir / "config.json", config.to_json())
        return session.run_to_end(should_stop)


class _Session:
    """One process's part of a run, from a start or resume to the end or the next stop."""

    def __init__(self, config: TrainConfig, group: Group, run: OpenRun, on_record: Callable[[Record], None]) -> None:
        """Start at the newest checkpoint, or with a new student."""
        self.config, self.group, self.run, self.on_record = config, group, run, on_record
        checkpoint = newest_checkpoint(config.run_dir / "checkpoints")
        group.barrier()  # all have seen the same newest checkpoint before one writes the next
        state = None if checkpoint is None else load_state(checkpoint)
        self.step = 0 if state is None else state.step
        self.tokens = 0 if state is None else state.tokens
        if checkpoint is None or state is None:
            self.student, self.stored_dtype = build_student(
                config.student,
                seed=config.train.seed,
                vocab_size=run.vocab_size,
                row_tokens=run.row_tokens,
                special_ids=special_ids(run.corpus),
            )
        else:
            state.check_same(run.fingerprint, run.teachers, run.held)
            state.check_rows(run.left_out, run.reader.prefix)
            state.check_steps(config.train)
            self.student, self.stored_dtype = load_student(checkpoint / "model"), state.stored_dtype
        self.router = router_loss_of(self.student)
        self.student.train()
        self.model = group.wrap(self.student)  # the student, or a DistributedDataParallel around it
        self.optimizer = make_optimizer(self.student, config.train)
        if checkpoint is not None:
            load_optimizer(checkpoint, self.optimizer)
        self.writer: MetricsWriter | None = None
        if group.rank == 0:
            (config.run_dir / SUMMARY).unlink(missing_ok=True)  # the run goes on: it no longer ends there
            self.writer = MetricsWriter(config.run_dir, step=self.step)
        # On the monotonic clock, less what earlier sessions took.
        self.began = time.monotonic() - (0.0 if state is None else state.seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def run_to_end(self, should_stop: Callable[[], bool]) -> TrainResult:
        loop = self.config.train
        reader = self.run.reader if loop.alpha > 0 else self.run.reader.without_targets()
        found: dict[str, Evaluation] = {}
        stopped = False
        # At the end already when it was cut off between its last checkpoint and its summary.
        if self.step in (0, loop.steps):
            found = self._evaluate()
        # The only place where training waits for I/O. A read that hangs ends when the sources are closed.
        reading = read_ahead(reader.read, self._pieces(), self.config.data.prefetch, close_seconds=_CLOSE_SECONDS)
        try:
            with closing(reading) as batches:
                while self.step < loop.steps and not stopped:
                    record, stopped = self._step(batches, should_stop)
                    self._record(record)
                    if self.step % loop.eval_every == 0 or self.step == loop.steps:
                        found = self._evaluate()
                    if self.step % loop.checkpoint_every == 0 or self.step == loop.steps or stopped:
                        self._save()
                        self.group.barrier()
        except PotstillError as error:
            if not has_no_answer(error):
                raise
            return self._given_up(error, asked=should_stop())
        return self._end(found)

    def _given_up(self, error: PotstillError, *, asked: bool) -> TrainResult:
        """Stop between two steps, as nothing more can be read, or as somebody `asked` while it could not."""
        # No barrier: a worker that was evaluating may be the only one to know.
        self._save()
        told = f"{error.detail}; a checkpoint of step {self.step} was written, and the same command goes on from there"
        return replace(self._result({}), finished=False, problem="" if asked else told)

    def _result(self, found: Mapping[str, Evaluation]) -> TrainResult:
        finished = self.step >= self.config.train.steps
        return TrainResult(
            run_dir=self.config.run_dir,
            finished=finished,
            step=self.step,
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
            held_out=found.get(HELD_OUT) if finished else None,
            evaluations={name: one for name, one in found.items() if finished and name != HELD_OUT},
        )

    def _end(self, found: Mapping[str, Evaluation]) -> TrainResult:
        result = self._result(found)
        if result.finished and self.group.rank == 0:
            dtype = self.config.train.save_dtype or self.stored_dtype
            publish_model(self.config.run_dir / "model", self.student, self.run.corpus, dtype)
            write_json(result.run_dir / SUMMARY, result.to_json())
        self.group.barrier()
        return result

    def _step(self, batches: Iterator[Batch], should_stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step; return its record, over all workers, and True if one of them wants to stop."""
        loop, began = self.config.train, time.monotonic()
        self._seed()
        num_pieces = len(self._rank_pieces(self.step))
        num_teachers = len(self.config.teachers) if loop.alpha > 0 else 0
        # CE, a KL per teacher, the router loss, and how many workers want to stop: one reduction for all.
        sums = torch.zeros(3 + num_teachers, dtype=torch.float64, device=self.group.device)
        self.optimizer.zero_grad(set_to_none=True)
        experts = None
        if self.router is not None:
            batches, experts = self._count_experts(self.router, batches, num_pieces)
        unread, num_labels, num_positions = None, 0, 0
        try:
            num_labels, num_positions = self._global_counts()
            for _ in range(num_pieces - 1):
                with self._unsent_gradients():
                    sums[:-1] += self._forward_backward(next(batches), num_labels, num_positions, experts)
            last = next(batches)
        except PotstillError as error:
            if not has_no_answer(error):
                raise
            unread = error
        self._require_read(unread)
        sums[:-1] += self._forward_backward(last, num_labels, num_positions, experts)
        sums[-1] = float(should_stop())
        self.group.all_reduce_sum(sums)
        ce_sum, *kl_sums, router, stop = sums.tolist()
        record = self._means(ce_sum / max(num_labels, 1), [kl / max(num_positions, 1) for kl in kl_sums])
        if self.router is not None:
            record |= {"loss": record["loss"] + self.router.coefficient * router, "router_loss": router}
        record |= self._update(record["loss"])
        self.tokens += num_positions
        record["tokens"] = self.tokens
        record["tokens_per_second"] = round(num_positions / (time.monotonic() - began), 1)
        record["seconds"] = round(self.seconds, 3)
        return record, stop > 0

    def _require_read(self, unread: PotstillError | None) -> None:
        """Give the step up on all workers if one of them could not read its rows; it has not begun to send gradients.

        Raises:
            PotstillError: the error, or Unavailable for that of another worker.
        """
        lacking = torch.tensor(float(unread is not None), device=self.group.device)
        self.group.all_reduce_sum(lacking)
        if unread is not None:
            raise unread
        if lacking.item() > 0:
            raise Unavailable("another worker got no answer")

    def _means(self, ce: float, kls: list[float]) -> dict[str, Any]:
        """Losses of the step, before the update: nats per token of the global batch."""
        alpha = self.config.train.alpha
        weighted = sum(w * kl for w, kl in zip(self.config.weights, kls, strict=False))
        names = (teacher.name for teacher in self.config.teachers)
        loss = (1 - alpha) * ce + alpha * weighted
        return {"step": self.step + 1, "loss": loss, "ce": ce, "kl": dict(zip(names, kls, strict=False))}

    def _update(self, loss: float) -> dict[str, Any]:
        """Clip the gradient, take the optimizer's step and count it."""
        grad_norm = float(nn.utils.clip_grad_norm_(self.student.parameters(), self.config.train.grad_clip))
        # Before the step: NaN in the weights would also be in the next checkpoint.
        if not math.isfinite(loss + grad_norm):
            raise InvalidInput(
                f"at step {self.step + 1} the loss is {loss} and the gradient norm {grad_norm}; "
                "try a lower train.lr or a longer train.warmup"
            )
        rate = learning_rate(self.step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return {"lr": rate, "grad_norm": grad_norm, "epoch": self.run.epochs(self.step)}

    def _seed(self) -> None:
        """Begin the step's dropout; it depends on (seed, rank, step) only, so that a resumed run draws the same."""
        torch.manual_seed(int(hashed(np.array([self.step]), self.config.train.seed, self.group.rank)[0]))

    def _count_experts(
        self, router: RouterLoss, batches: Iterator[Batch], num_pieces: int
    ) -> tuple[Iterator[Batch], Tensor]:
        """Read this worker's micro-batches of a step; return them, and the global batch's positions by expert, [E]."""
        read: list[Batch] = []
        unread = None
        try:
            while len(read) < num_pieces:
                read.append(next(batches).to(self.group.device))
        except PotstillError as error:
            if not has_no_answer(error):
                raise
            unread = error
        self._require_read(unread)
        counts = router.count_all(self.student, read, self.config.train.dtype)
        self._seed()  # the second forward pass draws the dropout of this one
        return iter(read), self.group.all_reduce_sum(counts)

    def _forward_backward(self, batch: Batch, num_labels: int, num_positions: int, experts: Tensor | None) -> Tensor:
        """Add one micro-batch's gradient; return its undivided CE and KLs and its router loss, float64 [2 + M]."""
        batch = batch.to(self.group.device)
        # Rows are padded on the right, where a causal model's real positions never look: no attention mask.
        with autocast(self.group.device, self.config.train.dtype):
            out = self.model(input_ids=batch.tokens, use_cache=False)
        loss = distillation_loss(
            out.logits,
            batch.labels,
            batch.teachers,
            alpha=self.config.train.alpha,
            mask=batch.mask,
            num_labels=num_labels,
            num_positions=num_positions,
        )
        total, router = loss.total, torch.zeros_like(loss.ce_sum)
        if self.router is not None and experts is not None:
            part = self.router.of_part(out.router_logits, batch.real, experts)
            total, router = total + self.router.coefficient * part, part.detach().double()
        # DistributedDataParallel averages over workers; the counts are global, so the sum is wanted.
        (total * self.group.world_size).backward()  # type: ignore[no-untyped-call]
        return torch.cat([loss.ce_sum[None], loss.kl_sums, router[None]])

    def _unsent_gradients(self) -> AbstractContextManager[None]:
        """Keep gradients here: they go to the other workers once a step, with the last micro-batch."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _global_counts(self) -> tuple[int, int]:
        """Count labels and positions of this step's global batch."""
        return self.run.reader.counts(self.run.order.rank_slice(self.step, rank=0, world_size=1))

    def _rank_pieces(self, step: int) -> list[NDArray[np.int64]]:
        loop = self.config.train
        rows = self.run.order.rank_slice(step, self.group.rank, self.group.world_size)
        return [rows[i : i + loop.micro_batch_rows] for i in range(0, len(rows), loop.micro_batch_rows)]

    def _pieces(self) -> Iterator[NDArray[np.int64]]:
        for step in range(self.step, self.config.train.steps):
            yield from self._rank_pieces(step)

    def _evaluate(self) -> dict[str, Evaluation]:
        """Evaluate on the held-out rows, under the name `HELD_OUT`, and on each corpus that is for it."""
        loop, run = self.config.train, self.run
        judged = {name: (reader, np.arange(len(reader.corpus))) for name, reader in run.eval_readers.items()}
        on = {HELD_OUT: (run.reader, run.held_out)} | judged if len(run.held_out) else judged
        found = {
            name: evaluate_student(
                self.student, reader, rows, batch_rows=loop.micro_batch_rows, group=self.group, dtype=loop.dtype
            )
            for name, (reader, rows) in on.items()
        }
        if found:
            self._record({"step": self.step, **evaluations_to_json(found)})
        return found

    def _record(self, record: Record) -> None:
        if self.writer is not None:
            self.writer.write(record)
            self.on_record(record)

    def _save(self) -> None:
        loop = self.config.train
        if self.group.rank == 0:
            # All that the rest of the run depends on, beside the weights and the optimizer.
            state = TrainState(
                step=self.step,
                seed=loop.seed,
                epoch=max(self.run.order.epochs(self.step * loop.batch_rows)),
                cursor=self.step * loop.batch_rows,
                corpus_fingerprint=self.run.fingerprint,
                tokens=self.tokens,
                seconds=self.seconds,
                teachers={name: identity.to_json() for name, identity in self.run.teachers.items()},
                held=self.run.held,
                left_out=self.run.left_out,
                prefix_ids=self.run.reader.prefix,
                stored_dtype=self.stored_dtype,
            )
            folder = self.config.run_dir / "checkpoints"
            save_checkpoint(folder, self.student, self.optimizer, state, keep=loop.keep_checkpoints)
