"""A student distilled from SmolLM2 on conversations: it loads, pads, chats, and runs in lm_eval and in vLLM.

    python -m benchmarks.bench_chat_student [--lm-eval PYTHON] [--models FOLDER] [--out FOLDER]

40 short conversations on Python's help topics are ingested with SmolLM2's tokenizer and chat template, scored by the
real vLLM, and distilled into a Llama of 2 layers. Each line after that is a check of the published folder by programs
that know nothing of Potstill, held against `transformers` or against the teacher's folder; one that fails ends the
script with status 1. `--lm-eval` names a Python that has lm_eval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chat.conversations import Message, conversations, write_conversations

CONVERSATIONS = 40
STEPS = 40
_SETTINGS = """\
[data]
cache = "{cache}"
corpus = "talks"
held_out = 4

[[teachers]]
name = "smollm2"

[student.config]
model_type = "llama"
hidden_size = 128
intermediate_size = 384
num_hidden_layers = 2
num_attention_heads = 4
tie_word_embeddings = true

[train]
out = "{run}"
steps = {steps}
batch_rows = 4
micro_batch_rows = 4
lr = 4e-3
warmup = 4
alpha = 1.0
eval_every = {steps}
"""


def main() -> int:
    """Make the student and check it."""
    from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, metavar="PYTHON", help="an interpreter that has lm_eval")
    parser.add_argument("--models", type=Path, default=default_models_folder(), help="where SmolLM2 is, or comes to be")
    parser.add_argument("--out", type=Path, help="an empty folder to keep (default: a temporary one)")
    args = parser.parse_args()
    teacher = materialise(args.models)
    talks = conversations(CONVERSATIONS)
    with ExitStack() as stack:
        out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        student = distilled(out, teacher, talks)
        check(student, teacher, talks, out, args.lm_eval)
    return 0


def distilled(out: Path, teacher: Path, talks: list[list[Message]]) -> Path:
    """Ingest, prefill and train by the commands that users type; gives the published model's folder."""
    write_conversations(talks, out / "talks.jsonl")
    settings = _SETTINGS.format(cache=out / "cache", run=out / "run", steps=STEPS)
    (out / "student.toml").write_text(settings)
    cache = ["--cache", str(out / "cache"), "--corpus", "talks"]
    source = [str(out / "talks.jsonl"), "--messages-field", "messages", "--tokenizer", str(teacher)]
    potstill("ingest", *source, *cache)
    potstill("prefill", *cache, "--teacher", f"smollm2={teacher}")
    potstill("train", str(out / "student.toml"), "--no-ray")
    held_out = json.loads((out / "run" / "summary.json").read_text())["held_out"]
    kl = held_out["teachers"]["smollm2"]["kl"]
    print(f"held out: cross-entropy {held_out['ce']:.3f}, KL {kl:.3f} over {held_out['tokens']} targets")
    return out / "run" / "model"


def potstill(command: str, *arguments: str) -> None:
    """Run a command of Potstill and print its last line and its seconds."""
    began = time.monotonic()
    line = [sys.executable, "-m", "potstill.clients.cli", command, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr}")
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    print(f"{command}, {time.monotonic() - began:.0f} s: {last}", flush=True)


def check(folder: Path, teacher: Path, talks: list[list[Message]], out: Path, lm_eval: Path | None) -> None:
    """Print a line for each check of the published model."""
    from transformers import AutoTokenizer

    from benchmarks.chat import transformers_checks as plain
    from benchmarks.chat.engine_check import in_vllm
    from benchmarks.chat.lm_eval_check import in_lm_eval

    student, of_teacher = plain.load(folder), AutoTokenizer.from_pretrained(teacher)
    prompts = [talk[:-1] for talk in talks[:8]]
    print("loads:", plain.special_tokens(student, of_teacher))
    print("chat template:", plain.chat_template(student, of_teacher, talks))
    print("pads:", plain.padded_batch(student, [talks[0][:1], talks[1][:-1]]))
    print("generates:", plain.generation(student, prompts), flush=True)
    asked = "not run (no interpreter given)"
    print("lm_eval:", in_lm_eval(lm_eval, folder, student, talks, out) if lm_eval else asked, flush=True)
    print("vLLM:", in_vllm(folder, student, prompts))


if __name__ == "__main__":
    sys.exit(main())
