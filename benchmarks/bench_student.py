"""CPU time and memory of the student's loss: what distillation adds to cross-entropy, and fusing takes from it.

Interleaved, medians of CPU time of one thread, forward and backward, float32. Exits 1 when the loss of one or two
teachers, alone or with the linear layer, takes over 1.05 times as long as our own cross-entropy, or with the linear
layer over 1.10 times as long as torch's linear layer and cross-entropy on all logits; or when it makes an array of the
logits' size, or holds more than two chunks.

    python -m benchmarks.bench_student [--rounds 7]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.support.live_arrays import LiveArrays
from potstill.student_trainer.losses import TeacherTargets, distillation_loss, linear_distillation_loss
from potstill.student_trainer.losses.chunks import CHUNK_ELEMENTS

K = 64
HIDDEN = 512
POSITIONS = {32_768: 1920, 131_072: 500, 262_144: 375}
"""Positions of a step by vocabulary: several chunks, and some seconds."""
TEACHER_AIM, FUSED_AIM = 1.05, 1.10


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """All that a form of the loss needs."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    teachers: list[TeacherTargets]

    @classmethod
    def of(cls, vocab: int) -> Step:
        random = torch.Generator().manual_seed(0)
        n = POSITIONS[vocab]
        hidden = torch.randn(n, HIDDEN, generator=random).requires_grad_()
        weight = (torch.randn(vocab, HIDDEN, generator=random) * HIDDEN**-0.5).requires_grad_()
        labels = torch.randint(vocab, (n,), generator=random)
        teachers = []
        for _ in range(2):
            ids = torch.rand(n, vocab, generator=random).topk(K, dim=-1).indices.int()
            logprobs = torch.log_softmax(2 * torch.randn(n, K + 1, generator=random), dim=-1)
            teachers.append(TeacherTargets(ids, logprobs[:, :K].contiguous(), logprobs[:, K].contiguous(), 0.5))
        return cls(hidden, weight, labels, teachers)

    def settings(self, teachers: int) -> dict[str, Any]:
        n = len(self.labels)
        mask = torch.ones(n, dtype=torch.bool)
        return {"alpha": 0.5 if teachers else 0.0, "mask": mask, "num_labels": n, "num_positions": n}

    def fused(self, teachers: int) -> Tensor:
        those, settings = self.teachers[:teachers], self.settings(teachers)
        return linear_distillation_loss(self.hidden, self.weight, self.labels, those, **settings).total

    def of_logits(self, teachers: int) -> Tensor:
        logits = self.hidden @ self.weight.t()
        return distillation_loss(logits, self.labels, self.teachers[:teachers], **self.settings(teachers)).total

    def plain(self) -> Tensor:
        return functional.cross_entropy(self.hidden @ self.weight.t(), self.labels)

    def dense(self) -> Tensor:
        """Cross-entropy and the KL to a dense teacher, the way that it is mostly written."""
        logits = self.hidden @ self.weight.t()
        with torch.no_grad():
            teacher = logits.roll(1, dims=0).log_softmax(dim=-1)
        ours = functional.log_softmax(logits, dim=-1)
        kl = functional.kl_div(ours, teacher, reduction="batchmean", log_target=True)
        return 0.5 * functional.cross_entropy(logits, self.labels) + 0.5 * kl


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    missed = []
    for vocab, n in POSITIONS.items():
        step = Step.of(vocab)
        print(f"V {vocab:,}, H {HIDDEN}, {n} positions, K {K}", flush=True)
        missed += loss_alone(step, args.rounds) + with_linear(step, args.rounds) + memory(step)
    for told in missed:
        print(f"missed: {told}")
    return int(bool(missed))


def loss_alone(step: Step, rounds: int) -> list[str]:
    """Time the loss of given logits."""
    logits = (step.hidden @ step.weight.t()).detach().requires_grad_()

    def ours(teachers: int) -> Callable[[], Tensor]:
        those, settings = step.teachers[:teachers], step.settings(teachers)
        return lambda: distillation_loss(logits, step.labels, those, **settings).total

    forms = {"our cross-entropy": ours(0), "1 teacher": ours(1), "2 teachers": ours(2)}
    forms["torch cross-entropy"] = lambda: functional.cross_entropy(logits, step.labels)
    seconds = timed(forms, [logits], rounds)
    return told("  loss alone", seconds, "our cross-entropy", TEACHER_AIM, ("1 teacher", "2 teachers"))


def with_linear(step: Step, rounds: int) -> list[str]:
    """Time the linear layer with the loss."""
    forms: dict[str, Callable[[], Tensor]] = {
        "torch linear + cross-entropy": step.plain,
        "fused cross-entropy": lambda: step.fused(0),
        "fused, 1 teacher": lambda: step.fused(1),
        "fused, 2 teachers": lambda: step.fused(2),
    }
    seconds = timed(forms, [step.hidden, step.weight], rounds)
    fused = ("fused, 1 teacher", "fused, 2 teachers")
    return [
        *told("  with linear", seconds, "torch linear + cross-entropy", FUSED_AIM, fused),
        *told("  with linear", seconds, "fused cross-entropy", TEACHER_AIM, fused),
    ]


def timed(forms: dict[str, Callable[[], Tensor]], leaves: list[Tensor], rounds: int) -> dict[str, float]:
    """Take the median CPU seconds of forward and backward of each form, one after the other in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, form in forms.items():
            began = time.process_time()
            torch.autograd.grad(form(), leaves)
            if i:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    return {name: median(each) for name, each in seconds.items()}


def told(what: str, seconds: dict[str, float], base: str, aim: float, held: tuple[str, ...]) -> list[str]:
    """Print times over that of `base`; give those among `held` that miss the aim."""
    ratios = {name: value / seconds[base] for name, value in seconds.items()}
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name != base)
    print(f"{what}: {base} {seconds[base]:.2f} s; x {shown}", flush=True)
    return [f"{what.strip()}: {name} is {ratios[name]:.3f} x {base}" for name in held if ratios[name] > aim]


def memory(step: Step) -> list[str]:
    """Print what each form holds at most beside its inputs; tell of a fused form that holds too much."""
    forms: dict[str, Callable[[], Tensor]] = {
        "fused, 2 teachers": lambda: step.fused(2),
        "of logits, 2 teachers": lambda: step.of_logits(2),
        "torch cross-entropy": step.plain,
        "dense KL": step.dense,
    }
    shown, missed = [], []
    vocab, n = len(step.weight), len(step.labels)
    for name, form in forms.items():
        with LiveArrays() as live:
            torch.autograd.grad(form(), [step.hidden, step.weight])
        shown.append(f"{name} {live.peak_bytes / 2**20:.0f} MiB")
        if name.startswith("fused"):
            num_chunks = -(-n // (CHUNK_ELEMENTS // (vocab + 16 * K)))
            chunk = -(-n // num_chunks)
            chunks = live.most(elements=chunk * (vocab + 1), dtype=torch.float32)
            shown[-1] += f" ({chunks} [{chunk}, V] of float32)"
            whole = sum(live.most(elements=n * columns, dtype=torch.float32) for columns in (vocab, vocab + 1))
            if chunks > 2 or whole:
                missed.append(f"V {vocab:,}: {chunks} chunks and {whole} arrays of the logits' size live")
    gradient = vocab * HIDDEN * 4 / 2**20
    print(f"  peak: {', '.join(shown)}; the weight's gradient alone {gradient:.0f} MiB", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
