"""Settings of the training loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from potstill.student_trainer.losses.settings import LossConfig
from potstill.student_trainer.settings import Count


def _workers(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("it is neither a whole number above 0 nor two of them, [least, most]")
    return value


class LoopConfig(LossConfig):
    """Settings of the training loop. Lengths are in steps, batches in rows."""

    out: str = Field(min_length=1)
    """The run's folder, which all workers must see; or its URL in an object store, for workers on one machine."""
    steps: Count
    """Optimizer steps; a longer run may go on from a shorter one."""
    batch_rows: Count = 32
    """Rows of one optimizer step, over all workers."""
    micro_batch_rows: Count = 8
    """Rows of one forward pass of one worker; fewer need less memory, and change the result by rounding only."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """The highest learning rate."""
    warmup: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to `min_lr`, constant, or constant with a linear fall over the last `decay` share."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at which cosine and wsd end."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps over which wsd falls."""
    schedule_steps: Count | None = None
    """Steps of the schedule, by default `steps`: a run that will be extended names its whole length from the start."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of AdamW, on matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    rollback_over: Annotated[float, Field(gt=0)] | None = None
    """Goes back to the last checkpoint, and leaves a step's rows out, where its loss is no number or its cross-entropy
    so many standard deviations over the mean of those before it; by default it never does."""
    rollback_window: Annotated[int, Field(ge=2, strict=True)] = 100
    """Number of steps whose cross-entropy a spike is told by."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Seed of the initial weights, the sample order and dropout."""
    eval_every: Count = 100
    """Steps between two looks at the held-out rows."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints; one more is written on Ctrl-C and at the end."""
    keep_checkpoints: Count = 2
    """The newest ones; older ones are removed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass; weights and optimizer stay float32."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the published model; by default that of `student.checkpoint`, or float32 for random weights."""
    workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    """Ray workers, each on a `device` of its own; `[least, most]` trains with as many as have a place at the time."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`gpu` is one GPU for each worker, or a refusal; `auto` is `gpu` where there are GPUs, and `cpu` elsewhere."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the student's layers with `torch.compile`: faster on GPUs, after a minute or so at the start."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp` gives each worker the whole student; `fsdp` a part of it, for one that does not fit a GPU."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Services that get the numbers of `metrics.jsonl`, too; they are told where by their own environment variables."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Operations a second of one device at its best, for `mfu`; by default known for some GPUs in bfloat16."""
    max_failures: Annotated[int, Field(ge=0, strict=True)] = 3
    """Number of times that killed workers are started again from the newest checkpoint; a bad setting ends the run."""
    max_preemptions: Annotated[int, Field(ge=0, strict=True)] | None = None
    """As many where Ray says that a node was taken away, counted apart; by default without end."""
    worker_runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's, for the workers, like `{ env_vars = { NCCL_DEBUG = "INFO" } }`; no place for keys, as Ray logs it."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rollback_over is None and self.rollback_window != LoopConfig.model_fields["rollback_window"].default:
            raise ValueError(f"rollback_window is {self.rollback_window}, but there is no rollback_over; leave it out")
        if self.workers_range[0] > self.workers_range[1]:
            raise ValueError(f"workers {list(self.workers_range)} are not the least and the most; turn them round")
        if self.batch_rows < self.workers_range[1]:
            raise ValueError(
                f"batch_rows {self.batch_rows} is less than one row for each of {self.workers_range[1]} workers"
            )
        return self

    @property
    def workers_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers
