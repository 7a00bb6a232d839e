"""The training loop: plain PyTorch, alone or as one of several workers.

1. The rows of step s are `order.take(order.cursor(s), batch_rows)`; each worker takes its slice and packs it
   into micro-batches, which threads read ahead.
2. Every micro-batch's loss is a sum divided by the counts of the *global* batch, known before it is read, so
   gradients add up: micro-batches and workers change the result by rounding only.
3. Gradients are summed over micro-batches and workers, clipped, and AdamW takes a step.
4. Now and then the student is evaluated on held-out rows, and a checkpoint is written.
5. From a loss spike the run goes back to its last checkpoint, where that is asked for.

`learner` has 2 and 3, `rollback` what 5 is told by; here is what goes on around the steps.

Nothing but (seed, step) decides what step s does, so a run that resumes from a checkpoint on one CPU worker
continues bit for bit. When asked to stop, it finishes the step, writes a checkpoint and returns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.cache.errors import PotstillError, Unavailable
from potstill.cache.plurals import counted
from potstill.clients.patience import Patience, has_no_answer
from potstill.student_trainer.checkpoint.checkpoints import Checkpoints, checkpoints_of, load_model, load_optimizer
from potstill.student_trainer.checkpoint.export import publish_model
from potstill.student_trainer.checkpoint.folders import agreed_checkpoint, step_of
from potstill.student_trainer.checkpoint.format import TrainState, load_state
from potstill.student_trainer.checkpoint.stored import bring_run, stored_run
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import only_trainer, write_json
from potstill.student_trainer.data.steps import StepStream
from potstill.student_trainer.evaluate.result import (
    HELD_OUT,
    SUMMARY,
    Evaluation,
    TrainResult,
    evaluations_to_json,
    finished_before,
)
from potstill.student_trainer.metrics.overfitting import OverfittingWatch
from potstill.student_trainer.metrics.records import MetricsWriter, Record, read_metrics
from potstill.student_trainer.metrics.speed import Speed
from potstill.student_trainer.metrics.trackers import open_trackers
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.corpus_tokenizer import special_ids
from potstill.student_trainer.parallel.group import Group, device_for
from potstill.student_trainer.train.learner import Learner
from potstill.student_trainer.train.optimizer import warn_of_jump
from potstill.student_trainer.train.rollback import Spike, SpikeWatch, skip
from potstill.student_trainer.train.run import OpenRun, evaluate_on_all, open_run

_CLOSE_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    group: Group | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Record], None] = lambda _: None,
    on_begin: Callable[[int], None] = lambda _: None,
    brought: int | None = None,
) -> TrainResult:
    """Start, continue or find finished the run in `config.train.out`; every worker of the group calls it.

    Args:
        config: the run.
        group: the workers; this process alone by default.
        should_stop: asked after every step; when any worker's says yes, all write a checkpoint and return.
        on_record: called on rank 0 with every record of `metrics.jsonl`.
        on_begin: called on rank 0 when all is checked, with the step that the run goes on from, or -1.
        brought: what `bring_run` gave, where it was called before.

    Raises:
        SpecMismatch: the folder holds a run of another config, corpus or teacher, or a teacher does not fit.
        CorruptSegment: all checkpoints of the run are damaged.
        StoreError: the disk does not take a checkpoint; the older ones stay.
        InvalidInput: the config asks for what cannot be, or the loss is no longer a number.
        Unavailable: another process is training in the same folder; or a service did not answer for `data.patience`
            seconds, and a checkpoint was written, from which the same call goes on.
        PotstillError: whatever reading rows and targets raises.
    """
    group = group or Group(device=device_for(config.train.device))
    if group.rank == 0 and brought is None:
        brought = bring_run(config)
    group.barrier()
    good = -1 if brought is None else brought

    def begin(step: int) -> None:
        on_begin(step)
        warn_of_jump(config, step)

    result = run_session(config, group, should_stop=should_stop, on_record=on_record, on_begin=begin, good=good)
    if result.problem:
        raise Unavailable(result.problem)
    return result


def run_session(
    config: TrainConfig,
    group: Group,
    *,
    should_stop: Callable[[], bool],
    on_record: Callable[[Record], None] = lambda _: None,
    on_begin: Callable[[int], None] = lambda _: None,
    on_evaluation: Callable[[dict[str, Any]], None] = lambda _: None,
    should_save: Callable[[], bool] = lambda: False,
    good: int = -1,
) -> TrainResult:
    """Train like `train`, but return a result with a `problem` where a service does not answer.

    `good` is the step of a checkpoint that the caller has compared with its hashes; `on_evaluation` is called on every
    worker with the record of each. `should_save` is asked on every worker after a step, and answers all of them alike.
    """
    config = config.absolute()
    finished = finished_before(config)
    if finished is not None:
        return finished
    with ExitStack() as stack:
        patience = Patience(config.data.patience, _LOG.warning, given_up=should_stop)
        run = stack.enter_context(open_run(config)).patient(patience)
        _require_same_order(run, group)
        if group.rank == 0:
            stack.enter_context(only_trainer(config.run_dir))
            if run.flagged_rows:
                told = counted(run.flagged_rows, "row"), run.flagged_held_out
                _LOG.warning("%s left out, %d held-out ones among them, as annotations flag them", *told)
            if run.skipped_rows:
                _LOG.warning("%s without targets skipped, held-out ones among them", counted(run.skipped_rows, "row"))
        # Dropout draws from torch's global stream, which is the caller's again afterwards.
        stack.enter_context(torch.random.fork_rng([group.device] if group.device.type == "cuda" else []))
        spike: Spike | None = None
        while True:
            checkpoint = agreed_checkpoint(config.run_dir, group, good=good)
            session = _Session(config, group, run, checkpoint, on_record, on_evaluation)
            if session.writer is not None and spike is None:
                on_begin(step_of(checkpoint))
            try:
                return session.run_to_end(should_stop, should_save, back_from=spike)
            except Spike as error:
                run = replace(run, order=skip(config, run.order, error, group))
                spike = error.with_traceback(None)
            del session  # with its student, before that of the next one is loaded


def _require_same_order(run: OpenRun, group: Group) -> None:
    """Check that all workers skip the same rows.

    Raises:
        Unavailable: a shard was filled, or rows annotated, between the looks of two workers.
    """
    mine = int(run.lacking[:10] or "0", 16) + int(run.flagged[:10] or "0", 16)
    seen = group.all_reduce_sum(torch.tensor(float(mine), dtype=torch.float64, device=group.device))
    if seen.item() != mine * group.world_size:
        raise Unavailable("the workers found different shards without targets, or annotations; start again")


def _student(
    config: TrainConfig, group: Group, run: OpenRun, checkpoint: Path | None, state: TrainState | None
) -> tuple[PreTrainedModel, str]:
    """Load the student of a checkpoint that fits the run, or build a new one; and the dtype in which it is published.

    Raises:
        SpecMismatch, InvalidInput: the checkpoint is of another run.
    """
    if checkpoint is None or state is None:
        return group.share(
            lambda: build_student(
                config.student,
                seed=config.train.seed,
                vocab_size=run.vocab_size,
                row_tokens=run.row_tokens,
                special_ids=special_ids(run.corpus),
            )
        )
    state.check_same(run.fingerprint, run.teachers, run.held)
    state.check_rows(run.left_out, run.reader.prefix)
    state.check_lacking(run.lacking)
    state.check_flagged(run.flagged)
    state.check_steps(config.train)
    return load_model(checkpoint, group), state.stored_dtype


class _Session:
    """One process's part of a run, from a start or resume to the end or the next stop."""

    def __init__(
        self,
        config: TrainConfig,
        group: Group,
        run: OpenRun,
        checkpoint: Path | None,
        on_record: Callable[[Record], None],
        on_evaluation: Callable[[dict[str, Any]], None],
    ) -> None:
        """Start at a checkpoint, or with a new student."""
        self.config, self.group, self.opened = config, group, run
        self.on_record, self.on_evaluation = on_record, on_evaluation
        state = None if checkpoint is None else load_state(checkpoint)
        self.step = 0 if state is None else state.step
        self.saved = -1 if state is None else state.step
        """The step of the newest checkpoint."""
        self.tokens = 0 if state is None else state.tokens
        student, self.stored_dtype = _student(config, group, run, checkpoint, state)
        self.learner = Learner.of(config, group, run, student)
        self.speed = Speed.of(
            student,
            group.device,
            workers=group.world_size,
            dtype=config.train.dtype,
            peak_flops=config.train.peak_flops,
        )
        if checkpoint is not None:
            load_optimizer(checkpoint, student, self.learner.optimizer, group)
        self.stored = stored_run(config) if group.rank == 0 else None
        self.checkpoints = self._checkpoints()
        self.writer: MetricsWriter | None = None
        if group.rank == 0:
            (config.run_dir / SUMMARY).unlink(missing_ok=True)  # the run goes on: it no longer ends there
            # Before its first checkpoint a run begins anew, with all of its records.
            after = -1 if state is None else state.step
            self.writer = MetricsWriter(config.run_dir, open_trackers(config, step=after), step=after)
            self.overfitting = OverfittingWatch(read_metrics(config.run_dir))
        self.spikes = SpikeWatch(config, group, step=self.step)
        # On the monotonic clock, less what earlier sessions took.
        self.began = time.monotonic() - (0.0 if state is None else state.seconds)

    def _checkpoints(self) -> Checkpoints:
        published = (lambda _: None) if self.stored is None else self.stored.put_checkpoint
        keep = self.config.train.keep_checkpoints
        return checkpoints_of(self.config.run_dir / "checkpoints", self.group, keep, published)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def run_to_end(
        self, should_stop: Callable[[], bool], should_save: Callable[[], bool], *, back_from: Spike | None
    ) -> TrainResult:
        """Train to the end, or to the next stop.

        Raises:
            Spike: the run is to go back.
        """
        with ExitStack() as stack:
            stack.enter_context(closing(self.checkpoints))
            if self.writer is not None:
                stack.enter_context(closing(self.writer))
                # Only now that all it needs is there: a folder with a config.json refuses any other run.
                write_json(self.config.run_dir / "config.json", self.config.to_json())
            if back_from is not None:
                rows, number = self.config.train.batch_rows, len(self.opened.order.skipped)
                told = {"from_step": back_from.step, "skipped_rows": rows, "number": number, "why": back_from.told}
                self._record({"step": self.step, "rollback": told})
            return self._train(should_stop, should_save)

    def _train(self, should_stop: Callable[[], bool], should_save: Callable[[], bool]) -> TrainResult:
        loop = self.config.train
        found: dict[str, Evaluation] = {}
        stopped = False
        try:
            # At the end already when it was cut off between its last checkpoint and its summary.
            if self.step in (0, loop.steps):
                found = self._evaluate()
            # The only place where training waits for I/O. A read that hangs ends when the sources are closed.
            reading = self.learner.read_steps(range(self.step, loop.steps))
            with reading.until_closed(_CLOSE_SECONDS) as batches:
                while self.step < loop.steps and not stopped:
                    record, stopped = self._step(batches, should_stop)
                    self._record(record)
                    if self.step % loop.eval_every == 0 or self.step == loop.steps:
                        found = self._evaluate()
                    if self.step % loop.checkpoint_every == 0 or self.step == loop.steps or stopped or should_save():
                        self._save()
                        self.group.barrier()
        except PotstillError as error:
            if not has_no_answer(error):
                raise
            return self._given_up(error, asked=should_stop())
        return self._end(found)

    def _given_up(self, error: PotstillError, *, asked: bool) -> TrainResult:
        """Stop between two steps, as nothing more can be read, or as somebody `asked` while it could not."""
        self._save()
        self.checkpoints.wait()
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
            skipped_rows=self.opened.skipped_rows,
            rollbacks=len(self.opened.order.skipped),
            held_out=found.get(HELD_OUT) if finished else None,
            evaluations={name: one for name, one in found.items() if finished and name != HELD_OUT},
        )

    def _end(self, found: Mapping[str, Evaluation]) -> TrainResult:
        self.checkpoints.wait()
        result = self._result(found)
        student = self.group.whole_student(self.learner.student) if result.finished else None
        if student is not None and self.group.rank == 0:
            dtype = self.config.train.save_dtype or self.stored_dtype
            publish_model(self.config.run_dir / "model", student, self.opened.corpus, dtype)
            write_json(result.run_dir / SUMMARY, result.to_json())
            if self.stored is not None:
                self.stored.put_result(self.step)
        self.group.barrier()
        return result

    def _step(self, batches: StepStream, should_stop: Callable[[], bool]) -> tuple[Record, bool]:
        """Take one optimizer step and count it; return its record, and True if a worker wants to stop."""
        began, waited = time.monotonic(), batches.waited
        record, counts, stop = self.learner.step(self.step, batches, should_stop)
        self.spikes.check(self.step + 1, record)
        self.step += 1
        self.tokens += counts.num_positions
        seconds = time.monotonic() - began
        times = {
            "tokens_per_second": round(counts.num_positions / seconds, 1),
            **self.speed.measure(
                tokens=counts.num_tokens,
                rows=self.config.train.batch_rows,
                seconds=seconds,
                waited=batches.waited - waited,
            ),
            "seconds": round(self.seconds, 3),
        }
        skipped = {"skipped_rows": self.opened.skipped_rows} if self.opened.skipped_rows else {}
        return {**record, "tokens": self.tokens, **skipped, **times}, stop

    def _evaluate(self) -> dict[str, Evaluation]:
        found = evaluate_on_all(self.learner.student, self.opened, self.config, self.group)
        if found:
            record = {"step": self.step, **evaluations_to_json(found)}
            self._record(record)
            self.on_evaluation(record)
        return found

    def _record(self, record: Record) -> None:
        if self.writer is not None:
            record = self.overfitting.follow(record)
            self.writer.write(record)
            self.on_record(record)

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this step. All workers call it, as all may have a part of it."""
        loop = self.config.train
        if self.saved == self.step:
            return
        self.saved = self.step
        # All that the rest of the run depends on, beside the weights and the optimizer.
        state = TrainState(
            step=self.step,
            seed=loop.seed,
            epoch=max(self.opened.order.epochs(self.opened.order.cursor(self.step))),
            cursor=self.opened.order.cursor(self.step),
            corpus_fingerprint=self.opened.fingerprint,
            tokens=self.tokens,
            seconds=self.seconds,
            teachers={name: identity.to_json() for name, identity in self.opened.teachers.items()},
            held=self.opened.held,
            left_out=self.opened.left_out,
            lacking=self.opened.lacking,
            flagged=self.opened.flagged,
            prefix_ids=self.opened.reader.prefix,
            stored_dtype=self.stored_dtype,
        )
        self.checkpoints.save(self.learner.student, self.learner.optimizer, state)
