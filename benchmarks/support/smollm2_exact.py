"""SmolLM2's exact targets on the standard library's prose, from a plain transformers float32 forward.

What the size and error figures are measured on: nothing here goes through this project's capture or encodings.
Made once (minutes), then read from `~/.cache/potstill/bench`.

    python -m benchmarks.support.smollm2_exact
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.cache import Targets
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise

K = 256
DRAWS = 50
SEED = 0
TEMPERATURES = (2.0, 4.0)
ROW_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """Top-256 targets of P positions, flat; the tail is of K=256."""

    tokens: NDArray[np.uint32]
    row_starts: NDArray[np.int64]
    targets: Targets
    draw_offsets: NDArray[np.int64]
    """[P+1]."""
    draw_ids: NDArray[np.uint32]
    """Unique ids, rising within a position."""
    draw_counts: NDArray[np.uint16]
    log_z: NDArray[np.float32]
    """[P, 2]: log sum of p**(1/T)."""
    vocab_size: int


def load(folder: Path | None = None) -> Exact:
    """The targets, made at the first call."""
    path = (folder or _default_folder()) / f"smollm2-exact-k{K}.npz"
    if not path.exists():
        make(path)
    with np.load(path) as data:
        a = {name: data[name] for name in data.files}
    targets = Targets(
        ids=a["ids"],
        logprobs=a["logprobs"],
        log_tail=a["log_tail"],
        label_logprob=a["label_logprob"],
        entropy=a["entropy"],
    )
    return Exact(
        a["tokens"], a["row_starts"], targets, a["draw_offsets"], a["draw_ids"], a["draw_counts"], a["log_z"], 49_152
    )


def make(path: Path) -> None:
    """Score every row and write the file."""
    from pydoc_data.topics import topics

    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM

    folder = materialise(default_models_folder())
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = np.array(load_tokenizer(folder).encode(text, add_special_tokens=False).ids, dtype=np.uint32)
    starts = np.append(np.arange(0, len(tokens), ROW_TOKENS), len(tokens))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    parts: dict[str, list[NDArray[np.generic]]] = {}
    for row in track([tokens[a:b] for a, b in pairwise(starts)], "scoring"):
        with torch.no_grad():
            logprobs = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].log_softmax(-1)
        for name, array in _columns(row, logprobs, generator).items():
            parts.setdefault(name, []).append(array)
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    lengths = joined.pop("draw_lengths").astype(np.int64)
    joined["draw_offsets"] = np.concatenate([[0], np.cumsum(lengths)])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, tokens=tokens, row_starts=starts.astype(np.int64), **joined)
    os.replace(partial, path)


def _columns(row: NDArray[np.uint32], logprobs: object, generator: object) -> dict[str, NDArray[np.generic]]:
    import torch

    assert isinstance(logprobs, torch.Tensor)
    assert isinstance(generator, torch.Generator)
    top = logprobs.topk(K, dim=-1)
    probabilities = logprobs.double().exp()
    kept = top.values.double().exp().sum(-1)
    label = torch.full((len(row),), float("nan"))
    label[:-1] = logprobs[torch.arange(len(row) - 1), torch.from_numpy(row[1:].astype(np.int64))]
    drawn = torch.multinomial(logprobs.exp(), DRAWS, replacement=True, generator=generator).numpy()
    unique = [np.unique(position, return_counts=True) for position in drawn]
    tempered = [(logprobs / t).double().logsumexp(-1) for t in TEMPERATURES]
    return {
        "ids": top.indices.numpy().astype(np.uint32),
        "logprobs": top.values.numpy(),
        "log_tail": torch.log((1 - kept).clamp_min(1e-12)).float().numpy(),
        "label_logprob": label.numpy(),
        "entropy": -(probabilities * logprobs).sum(-1).float().numpy(),
        "log_z": torch.stack(tempered, dim=1).float().numpy(),
        "draw_lengths": np.array([len(ids) for ids, _ in unique]),
        "draw_ids": np.concatenate([ids for ids, _ in unique]).astype(np.uint32),
        "draw_counts": np.concatenate([counts for _, counts in unique]).astype(np.uint16),
    }


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "potstill" / "bench"


if __name__ == "__main__":
    exact = load()
    num_positions = exact.targets.num_positions
    print(f"{num_positions} positions, {len(exact.draw_ids) / num_positions:.1f} unique draws")
