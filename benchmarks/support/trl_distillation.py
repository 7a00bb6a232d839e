"""A released TRL's server distillation, pointed at a vLLM server and at ours, by nothing but its URL.

    python -m benchmarks.support.trl_distillation --steps 12

The trainer is `trl.experimental.server_distillation.ServerDistillationTrainer` of TRL 1.16.0, as it is. A tiny random
student samples completions, the server scores them with the tiny random teacher, and the student learns from the top-k.
Both runs start from the same student and seed, so their losses are the same but for what the two servers' numbers
differ by. With --ours or --vllm a server that runs already is used.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support.corpora import topics
from tests.support.processes.vllm_server import potstill_serving, vllm_serving
from tests.support.tiny_models import make_tiny_llama


def losses_of_a_run(student: Path, url: str, output: Path, *, steps: int, top_k: int, beta: float) -> list[float]:
    """The loss of each step of a run whose teacher is at `url`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL, on the vLLM version that it has not been released for yet
        trainer = _trainer(student, url, output, steps=steps, top_k=top_k, beta=beta)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _trainer(student: Path, url: str, output: Path, *, steps: int, top_k: int, beta: float) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    config = ServerDistillationConfig(
        output_dir=str(output),
        teacher_model_server_url=url,
        loss_top_k=top_k,
        beta=beta,
        max_completion_length=24,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )
    prompts = [{"prompt": text[:60]} for text in topics(64, characters=60)]
    return ServerDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(student),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.0, help="0: forward KL on the top-k; over 0 takes --top-k 1")
    parser.add_argument("--teacher", type=Path, help="the model that --vllm and --ours serve")
    parser.add_argument("--vllm", metavar="URL")
    parser.add_argument("--ours", metavar="URL")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        teacher = args.teacher or make_tiny_llama(folder / "teacher", seed=0)
        student = make_tiny_llama(folder / "student", seed=1)
        runs: dict[str, list[float]] = {}
        for name, given, serve in (("vllm", args.vllm, vllm_serving), ("ours", args.ours, potstill_serving)):
            url = given or stack.enter_context(serve(teacher))
            runs[name] = losses_of_a_run(
                student, url, folder / name, steps=args.steps, top_k=args.top_k, beta=args.beta
            )
    apart = max(abs(a - b) for a, b in zip(runs["vllm"], runs["ours"], strict=True))
    print(json.dumps({**runs, "largest_difference": apart}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
