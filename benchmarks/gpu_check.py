"""Show what only a GPU can, in one command of at most six minutes: losses, their time and memory, a training step.

    python -m benchmarks.gpu_check [--small]

It needs torch, triton and transformers beside our own code. It prints lines for a person, and ends with one line of
JSON.

1. Loss and gradients on the device, in float32 and bfloat16, against float64 on the CPU, for every loss.
2. Triton's kernels for the passes over a chunk of logits and plain torch: the error of both, and their time; CUDA only.
3. Time and peak memory of the last linear layer with cross-entropy or distillation, forward and backward: fused, from
   logits, and as `torch.nn.functional.cross_entropy` has it.
4. ALiBi in LokiLM's attention, bfloat16: the error against float64, and the time, of wider keys, of flash-attn where it
   is installed, of a mask of numbers and of the kernel without ALiBi.
5. Steps of LokiLM (the preset `lokilm-1.4b`) in bfloat16 with float32 masters: tokens/s, MFU, peak memory,
   and the share of the time that copies of batches from pinned memory keep the device waiting.

`--small` has sizes for a CPU: it shows that the script runs, and none of its times mean anything.

Shape legend:  N positions, V vocabulary, H hidden size, K kept ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.student.attention_ways import MASKED, measured
from potstill.student_trainer.losses import LOSSES, Logits, Objective, TeacherTargets, linear_distillation_loss
from potstill.student_trainer.losses.chunks import CHUNK_ELEMENTS
from potstill.student_trainer.losses.logits import distillation_loss
from potstill.student_trainer.losses.rows import PLAIN, Rows, rows_for
from potstill.student_trainer.metrics.speed import PEAK_FLOPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the parts."""

    vocabularies: tuple[int, ...]
    positions: int
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    row_tokens: int
    batch_rows: int
    steps: int
    repeats: int
    k: int = 64


LARGE = Sizes(
    vocabularies=(32_768, 131_072, 262_144),
    positions=8192,
    hidden=2048,
    layers=24,
    heads=32,
    feed_forward=5632,
    row_tokens=2048,
    batch_rows=8,
    steps=12,
    repeats=7,
)
SMALL = Sizes(
    vocabularies=(1000,),
    positions=256,
    hidden=64,
    layers=2,
    heads=4,
    feed_forward=128,
    row_tokens=64,
    batch_rows=2,
    steps=3,
    repeats=2,
    k=8,
)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Hidden states [N, H], a head's weight [V, H], labels [N] and one or two teachers."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teachers: tuple[TeacherTargets, ...]

    @classmethod
    def random(cls, positions: int, vocab: int, hidden: int, k: int, teachers: int) -> Problem:
        """Make one on the CPU in float32, the same every time; its numbers are exact in bfloat16, too."""
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(positions, hidden, generator=generator)
        weight = torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5
        labels = torch.randint(vocab, (positions,), generator=generator)
        made = tuple(_teacher(positions, vocab, k, generator) for _ in range(teachers))
        states, weight = (part.bfloat16().float() for part in (states, weight))
        return cls(states, weight, labels, made)

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """Copy to a device, with hidden states and weight of a dtype that take gradients."""
        hidden, weight = (
            part.detach().to(device, dtype, copy=True).requires_grad_() for part in (self.hidden, self.weight)
        )
        moved = tuple(teacher.each(lambda tensor: tensor.to(device)) for teacher in self.teachers)
        return Problem(hidden, weight, self.labels.to(device), moved)

    def fused(self, alpha: float, objective: Objective | None = None) -> Tensor:
        """Compute the loss from hidden states."""
        return linear_distillation_loss(
            self.hidden, self.weight, self.labels, self.teachers, logits=Logits(), **self._counts(alpha, objective)
        ).total

    def of_logits(self, alpha: float, objective: Objective | None = None) -> Tensor:
        """Compute the same loss from logits."""
        logits = self.hidden @ self.weight.t()
        return distillation_loss(logits, self.labels, self.teachers, **self._counts(alpha, objective)).total

    def plain(self) -> Tensor:
        """Compute cross-entropy as torch has it, from float32 logits."""
        return nn.functional.cross_entropy((self.hidden @ self.weight.t()).float(), self.labels)

    def _counts(self, alpha: float, objective: Objective | None) -> dict[str, Any]:
        num = len(self.labels)
        mask = torch.ones_like(self.labels, dtype=torch.bool)
        counts = {"num_labels": num, "num_positions": num, "mask": mask}
        return {"alpha": alpha, "objective": objective, **counts}


def _teacher(positions: int, vocab: int, k: int, generator: torch.Generator) -> TeacherTargets:
    ids = torch.stack([torch.randperm(min(vocab, 4096), generator=generator)[:k] for _ in range(64)])
    ids = ids.repeat(-(-positions // 64), 1)[:positions] * (vocab // min(vocab, 4096))
    logprobs = torch.log_softmax(torch.randn(positions, k + 1, generator=generator) * 2, dim=-1)
    counts = torch.zeros_like(ids)
    counts[:, 0], counts[:, 1] = 30, 20
    return TeacherTargets(ids, logprobs[:, :k], logprobs[:, k], drawn_ids=ids, drawn_counts=counts)


def gradient_errors(device: torch.device, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Measure the largest error of a gradient over its largest entry, by loss and dtype, two teachers."""
    found: dict[str, dict[str, float]] = {}
    problem = Problem.random(min(512, sizes.positions), sizes.vocabularies[0], sizes.hidden, sizes.k, teachers=2)
    for loss in LOSSES:
        objective = Objective(loss)
        exact = problem.to(torch.device("cpu"), torch.float64)
        exact.fused(0.5, objective).backward()  # type: ignore[no-untyped-call]
        found[loss] = {}
        for dtype in (torch.float32, torch.bfloat16):
            on_device = problem.to(device, dtype)
            on_device.fused(0.5, objective).backward()  # type: ignore[no-untyped-call]
            errors = [
                float((ours.grad.double().cpu() - theirs.grad).abs().max() / theirs.grad.abs().max())
                for ours, theirs in ((on_device.hidden, exact.hidden), (on_device.weight, exact.weight))
                if ours.grad is not None and theirs.grad is not None
            ]
            found[loss][str(dtype).removeprefix("torch.")] = max(errors)
        print(f"gradient of {loss:15s}" + "".join(f"  {name} {error:.1e}" for name, error in found[loss].items()))
    return found


def kernels(device: torch.device, sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Measure the largest relative error and the milliseconds of both passes over a chunk, float32, interleaved."""
    forms = {"Triton's kernels": rows_for(device), "plain torch": PLAIN}
    if forms["Triton's kernels"] == PLAIN:
        print("passes over a chunk: there are no Triton kernels here")
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for vocab in sizes.vocabularies:
        z = torch.randn(min(sizes.positions, CHUNK_ELEMENTS // vocab), vocab + 1, device=device) * 4
        exact = _passes(PLAIN, z.double())
        error = {name: float((_passes(form, z.clone()) / exact - 1).abs().max()) for name, form in forms.items()}
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(sizes.repeats):
            for name, form in forms.items():
                given = z.clone()
                _wait(device)
                began = time.perf_counter()
                _passes(form, given)
                _wait(device)
                taken[name].append(1000 * (time.perf_counter() - began))
        found[str(vocab)] = {name: [error[name], statistics.median(taken[name])] for name in forms}
        for name, (far, milliseconds) in found[str(vocab)].items():
            print(f"V = {vocab:7,}  passes over a chunk, {name:16s}  error {far:.1e}  {milliseconds:9.3f} ms")
    return found


def _passes(rows: Rows, z: Tensor) -> Tensor:
    top, e_sum = rows.sums(z)
    rows.write(z, top, 1 / e_sum)
    return z


def times(device: torch.device, sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Measure milliseconds and peak MiB of each form at each vocabulary, interleaved; bfloat16."""
    found: dict[str, dict[str, list[float]]] = {}
    for vocab in sizes.vocabularies:
        forms: dict[str, Callable[[], Tensor]] = {}
        one, two = (
            Problem.random(sizes.positions, vocab, sizes.hidden, sizes.k, teachers).to(device, torch.bfloat16)
            for teachers in (1, 2)
        )
        labels_only = Problem(one.hidden, one.weight, one.labels, ())
        forms["torch's cross-entropy"] = labels_only.plain
        forms["cross-entropy, fused"] = partial(labels_only.fused, 0.0)
        forms["1 teacher, fused"] = partial(one.fused, 0.5)
        forms["2 teachers, fused"] = partial(two.fused, 0.5)
        forms["1 teacher, of logits"] = partial(one.of_logits, 0.5)
        taken: dict[str, list[float]] = {name: [] for name in forms}
        peaks: dict[str, float] = {}
        for _ in range(sizes.repeats):
            for name, form in forms.items():
                milliseconds, peaks[name] = _timed(device, form, (one, two))
                taken[name].append(milliseconds)
        found[str(vocab)] = {name: [statistics.median(taken[name]), peaks[name]] for name in forms}
        base = found[str(vocab)]["torch's cross-entropy"][0]
        for name, (milliseconds, peak) in found[str(vocab)].items():
            print(f"V = {vocab:7,}  {name:22s} {milliseconds:9.2f} ms  {milliseconds / base:5.2f} x  {peak:9.0f} MiB")
    return found


def _timed(device: torch.device, form: Callable[[], Tensor], problems: tuple[Problem, ...]) -> tuple[float, float]:
    for problem in problems:
        problem.hidden.grad = problem.weight.grad = None
    before = _begin_peak(device)
    began = time.perf_counter()
    form().backward()  # type: ignore[no-untyped-call]
    _wait(device)
    return 1000 * (time.perf_counter() - began), _peak(device) - before


def attention(device: torch.device, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Measure ways to attend with ALiBi on rows of the training step's."""
    shape = (sizes.heads, sizes.row_tokens, sizes.hidden // sizes.heads)
    found = measured(shape, torch.bfloat16, device, sizes.repeats)
    for name, one in found.items():
        print(f"attention: {one.row(name, found[MASKED])}")
    return {name: asdict(one) for name, one in found.items()}


def training_steps(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Measure steps of LokiLM with one teacher, batches copied from pinned memory beside them."""
    model, vocab = _lokilm(device, sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds: list[float] = []
    waiting: list[float] = []
    before = _begin_peak(device)
    for tokens, labels, teacher in _batches(device, sizes, vocab, waiting):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            num, mask = labels.numel(), torch.ones_like(labels, dtype=torch.bool)
            loss = linear_distillation_loss(
                hidden,
                model.lm_head.weight,
                labels,
                (teacher,),
                alpha=0.5,
                mask=mask,
                num_labels=num,
                num_positions=num,
            )
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    num_tokens = sizes.batch_rows * sizes.row_tokens
    step = statistics.median(seconds[2:] or seconds)
    # 6 operations for each parameter but the embedding's, and 12 L H T for attention (arXiv 2204.02311, appendix B).
    of_token = 6 * (num_parameters - vocab * sizes.hidden) + 12 * sizes.layers * sizes.hidden * sizes.row_tokens
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in _name(device)), float("nan"))
    found = {
        "parameters": float(num_parameters),
        "tokens_per_second": num_tokens / step,
        "mfu": of_token * num_tokens / step / peak_flops,
        "waiting_share": sum(waiting[2:]) / (sum(seconds[2:]) + sum(waiting[2:]) or 1.0),
        "peak_mib": _peak(device) - before,
    }
    print("training step: " + ", ".join(f"{name} {value:,.4g}" for name, value in found.items()))
    return found


def _lokilm(device: torch.device, sizes: Sizes) -> tuple[Any, int]:
    from potstill.student_trainer.models.lokilm import LokiLMConfig, LokiLMForCausalLM

    vocab = min(49_152, sizes.vocabularies[-1])
    config = LokiLMConfig(
        vocab_size=vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.row_tokens,
    )
    with torch.device(device):
        return LokiLMForCausalLM(config).train(), vocab


def _batches(
    device: torch.device, sizes: Sizes, vocab: int, waiting: list[float]
) -> Iterator[tuple[Tensor, Tensor, TeacherTargets]]:
    """Copy batches on a stream of their own, one ahead; append to `waiting` the seconds that each was waited for."""
    on_gpu = device.type == "cuda"
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.batch_rows, sizes.row_tokens)
    teacher = _teacher(shape[0] * shape[1], vocab, sizes.k, generator).each(
        lambda tensor: tensor.reshape(*shape, *tensor.shape[1:])
    )
    tokens = torch.randint(vocab, shape, generator=generator)
    if on_gpu:
        tokens, teacher = tokens.pin_memory(), teacher.each(lambda tensor: tensor.pin_memory())
    stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def copy() -> tuple[Tensor, TeacherTargets]:
        with torch.cuda.stream(stream):
            moved = teacher.each(lambda tensor: tensor.to(device, non_blocking=True))
            return tokens.to(device, non_blocking=True), moved

    ahead = copy()
    for _ in range(sizes.steps):
        began = time.perf_counter()
        if stream is not None:
            stream.synchronize()
        waiting.append(time.perf_counter() - began)
        now, ahead = ahead, copy()
        yield now[0], now[0].roll(-1, dims=1), now[1]


def _begin_peak(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    """Run the parts on the first GPU, or on the CPU with `--small`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, to see that the script runs")
    small = parser.parse_args().small
    if not small and not torch.cuda.is_available():
        parser.error("there is no GPU; --small runs on the CPU and shows only that the script works")
    device, sizes = torch.device("cpu" if small else "cuda"), SMALL if small else LARGE
    print(f"{_name(device)}, torch {torch.__version__}")
    report: dict[str, Any] = {"device": _name(device), "torch": torch.__version__}
    report["gradients"] = gradient_errors(device, sizes)
    report["kernels"] = kernels(device, sizes)
    report |= {"times": times(device, sizes), "attention": attention(device, sizes)}
    report["training"] = training_steps(device, sizes)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
