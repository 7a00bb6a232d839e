"""A student on one worker, and the optimizer steps that it takes with those of the other workers.

Shape legend:  M teachers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data import Batch
from potstill.student_trainer.data.order import hashed
from potstill.student_trainer.data.packing import keeps_rows_apart
from potstill.student_trainer.data.prefetch import Copies
from potstill.student_trainer.data.steps import MicroBatch, Part, StepCounts, StepStream, read_steps
from potstill.student_trainer.losses.mix import alpha_at, distils_at
from potstill.student_trainer.losses.objective import Objective
from potstill.student_trainer.losses.targets import TeacherTargets
from potstill.student_trainer.losses.weighting import weighted
from potstill.student_trainer.models.compiled import compile_layers
from potstill.student_trainer.models.distilled import Distilled
from potstill.student_trainer.models.router import RouterLoss, router_loss_of
from potstill.student_trainer.parallel.activation import compute_again
from potstill.student_trainer.parallel.agreement import all_have_read
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.optimizer import learning_rate, make_optimizer
from potstill.student_trainer.train.rollback import Spike
from potstill.student_trainer.train.run import OpenRun


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """A student in training."""

    config: TrainConfig
    group: Group
    run: OpenRun
    student: PreTrainedModel
    model: nn.Module
    """The student with its loss, or a `DistributedDataParallel` around it."""
    router: RouterLoss | None
    optimizer: torch.optim.Optimizer
    packs: bool
    """True if rows may share one of a micro-batch."""
    copies: Copies

    @classmethod
    def of(cls, config: TrainConfig, group: Group, run: OpenRun, student: PreTrainedModel) -> Learner:
        """Make a student ready to learn, which `group.share` gave. What is tried here, all workers try together.

        Raises:
            InvalidInput: its config asks for a router loss that it does not have, or that is not known.
        """
        router = router_loss_of(student)
        packs = _all_say(group, mine=config.data.packing and keeps_rows_apart(student))
        student.train()
        loop = config.train
        if loop.activation_checkpointing:
            compute_again(student)
        model, optimizer = _with_loss(student, config, group), make_optimizer(student, loop)
        return cls(config, group, run, student, model, router, optimizer, packs, Copies(group.device))

    def read_steps(self, steps: Iterable[int]) -> StepStream:
        """Read ahead this worker's micro-batches of the steps that follow so many steps each."""
        loop, data = self.config.train, self.config.data
        part = Part(
            rank=self.group.rank,
            world_size=self.group.world_size,
            micro_batch_rows=loop.micro_batch_rows,
            pack=self.packs,
        )
        return read_steps(
            self.run.reader,
            self.run.order,
            steps,
            part,
            readers=data.readers,
            ahead=data.prefetch,
            pin=self.group.device.type == "cuda",
            with_targets=lambda step: distils_at(loop, step),
        )

    def step(
        self, step: int, batches: Iterator[MicroBatch], should_stop: Callable[[], bool]
    ) -> tuple[dict[str, Any], StepCounts, bool]:
        """Take the optimizer step that follows `step` steps.

        Args:
            step: number of steps taken.
            batches: the step's micro-batches come next.
            should_stop: asked once.

        Returns:
            Its record, its counts over all workers, and True if one of them wants to stop.

        Raises:
            InvalidInput: the loss is no longer a number; Spike where the run goes back from that.
            PotstillError: whatever reading raises; Unavailable where another worker got no answer.
        """
        self._seed(step)
        alpha = alpha_at(self.config.train, step)
        num_teachers = len(self.config.teachers) if distils_at(self.config.train, step) else 0
        # CE, what is distilled, a KL per teacher and the positions that it is of, chunks, the router loss, and how many
        # workers want to stop: one reduction.
        sums = torch.zeros(5 + 2 * num_teachers, dtype=torch.float64, device=self.group.device)
        self.optimizer.zero_grad(set_to_none=True)
        experts = None
        if self.router is not None or self.group.in_step:
            batches = self._read_all(batches)
        if self.router is not None:
            read = list(batches)
            batches, experts = iter(read), self._count_experts(self.router, read, step)
        with all_have_read(self.group):
            last = next(batches)
            counts = last.step
            for _ in range(counts.micro_batches - 1):
                with self._unsent_gradients():
                    sums[:-1] += self._forward_backward(last.batch, step, counts, experts)
                last = next(batches)
        sums[:-1] += self._forward_backward(last.batch, step, counts, experts)
        sums[-1] = float(should_stop())
        self.group.all_reduce_sum(sums)
        ce_sum, distilled_sum, *of_teachers, alm_sum, router, stop = sums.tolist()
        distilled = distilled_sum / max(counts.num_positions, 1)
        record = self._means(alpha, ce_sum / max(counts.num_labels, 1), distilled, of_teachers)
        if self.config.train.alm and num_teachers:
            alm = alm_sum / max(counts.num_labels, 1)
            record |= {"loss": record["loss"] + self.config.train.alm * alm, "alm": alm}
        if self.router is not None:
            record |= {"loss": record["loss"] + self.router.coefficient * router, "router_loss": router}
        record |= self._update(step, record["loss"])
        return {"step": step + 1, **record, "padding": round(counts.padding, 4)}, counts, stop > 0

    def _means(self, alpha: float, ce: float, distilled: float, of_teachers: list[float]) -> dict[str, Any]:
        """Losses of the step, before the update: nats per token of the global batch, of KLs per resolved token."""
        half = len(of_teachers) // 2
        names = (teacher.name for teacher in self.config.teachers)
        sums = zip(names, of_teachers[:half], of_teachers[half:], strict=False)
        kls = {name: kl / resolved for name, kl, resolved in sums if resolved}
        return {"loss": (1 - alpha) * ce + alpha * distilled, "ce": ce, "kl": kls}

    def _update(self, step: int, loss: float) -> dict[str, Any]:
        """Clip the gradient and take the optimizer's step."""
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.train.grad_clip)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        # Before the step: NaN in the weights would also be in the next checkpoint.
        if not math.isfinite(loss + grad_norm):
            told = f"the loss is {loss} and the gradient norm {grad_norm}"
            if self.config.train.rollback_over is not None:
                raise Spike(step + 1, told)
            raise InvalidInput(f"at step {step + 1} {told}; try a lower train.lr or a longer train.warmup")
        rate = learning_rate(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {"lr": rate, "grad_norm": grad_norm, "epoch": self.run.epochs(step + 1)}

    def _seed(self, step: int) -> None:
        """Begin a step's dropout; it depends on (seed, rank, step) only, so that a resumed run draws the same."""
        # Without a GPU `torch.manual_seed` keeps each seed, and how it was called, for one that may come.
        seed = torch.manual_seed if self.group.device.type == "cuda" else torch.default_generator.manual_seed
        seed(int(hashed(np.array([step]), self.config.train.seed, self.group.rank)[0]))

    def _read_all(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Read this worker's micro-batches of a step before its first forward pass."""
        with all_have_read(self.group):
            read = [next(batches)]
            read += [next(batches) for _ in range(read[0].step.micro_batches - 1)]
        return iter([replace(each, batch=each.batch.to(self.group.device)) for each in read])

    def _count_experts(self, router: RouterLoss, read: Sequence[MicroBatch], step: int) -> Tensor:
        """Count the positions of the step's global batch by expert, [E]."""
        counts = router.count_all(self.student, [each.batch for each in read], self.config.train.dtype)
        self._seed(step)  # the second forward pass draws the dropout of this one
        return self.group.all_reduce_sum(counts)

    def _forward_backward(self, batch: Batch, step: int, counts: StepCounts, experts: Tensor | None) -> Tensor:
        """Add one micro-batch's gradient; return what `step` sums: undivided losses, resolved positions, [4 + 2M]."""
        batch, loop, world = self.copies.of(batch), self.config.train, self.group.world_size
        teachers: Sequence[TeacherTargets] = ()
        alpha, weights = alpha_at(loop, step), self.config.weights(step)
        if distils_at(loop, step):
            teachers = weighted(batch.teachers, weights, loop.weighting, loop.weighting_beta)
        # DistributedDataParallel averages over workers; the counts are global, so the sum is wanted.
        loss, router_logits = self.model(
            batch.inputs,
            batch.labels,
            batch.mask,
            teachers,
            alpha=alpha,
            num_labels=counts.num_labels / world,
            num_positions=counts.num_positions / world,
        )
        total, router = loss.total, torch.zeros_like(loss.ce_sum)
        if self.router is not None and experts is not None:
            part = self.router.of_part(router_logits, batch.real, experts)
            total, router = total + self.router.coefficient * world * part, part.detach().double()
        total.backward()
        resolved = [_resolved(teacher, batch.mask) for teacher in teachers]
        before, behind = torch.stack([loss.ce_sum, loss.distilled_sum]), torch.stack([loss.alm_sum, router])
        return torch.cat([before, loss.kl_sums, *resolved, behind])

    def _unsent_gradients(self) -> AbstractContextManager[None]:
        """Keep gradients here: they go to the other workers once a step, with the last micro-batch."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()


def _resolved(teacher: TeacherTargets, mask: Tensor) -> Tensor:
    """Positions that count, by what is resolved of each, [1] float64."""
    return (mask.sum() if teacher.alignment is None else teacher.resolved[mask].sum(dtype=torch.float64)).double()[None]


def _with_loss(student: PreTrainedModel, config: TrainConfig, group: Group) -> nn.Module:
    """Join a student with its loss, for all workers."""
    loop = config.train
    distilled = Distilled(student, loop.dtype, Objective(loop.loss, loop.jsd_beta, loop.temperature, loop.alm))
    if loop.compile:
        compile_layers(student, group.device)
    if not group.in_step:
        return group.wrap(distilled)
    if isinstance(student, FSDPModule):
        student.reshard()  # what was tried left whole weights in place of the parts that the optimizer is to have
    # The student is what is shared, as evaluations pass by its loss; the fused layer takes it apart.
    if distilled.fused:
        distilled.forward = group.within(student, distilled.forward)  # type: ignore[method-assign]
    return distilled


def _all_say(group: Group, *, mine: bool) -> bool:
    """Tell whether every worker says yes."""
    return group.all_reduce_sum(torch.tensor(float(mine), device=group.device)).item() == group.world_size
