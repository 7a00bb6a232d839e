"""Speed and memory of a run's steps, as its records and its progress line tell them.

MFU is the share of the devices' arithmetic that the model needs: 6 operations a token for each parameter but those of
an embedding that is only looked up, and 12 times layers, width and tokens of a row for attention (arXiv 2204.02311,
appendix B); what is computed again for want of memory does not count. Where the peak of a device is not known, as on
CPUs, or where a token does not go through all weights (experts), it is left out.

Memory is that of the first worker. The GPU's part was not run on one.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 operations a second, by what the device's name has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A student on its devices."""

    of_token: float | None
    """Operations of a training step for each token, but for attention; None where they are not known."""
    of_pair: float
    """Those of attention for each token, and token of its row."""
    peak: float | None
    """Operations a second of all workers' devices together; None where it is not known."""
    device: torch.device

    @classmethod
    def of(
        cls, student: nn.Module, device: torch.device, *, workers: int, dtype: str, peak_flops: float | None
    ) -> Speed:
        """Measure a student with a `transformers` config; `peak_flops` of one device, where it is given."""
        peak = peak_flops or (_known_peak(device) if dtype == "bfloat16" else None)
        of_token, of_pair = _operations(student)
        return cls(of_token=of_token, of_pair=of_pair, peak=peak and peak * workers, device=device)

    def measure(self, *, tokens: int, rows: int, seconds: float, waited: float) -> dict[str, int | float]:
        """Tell of one step: its tokens of all workers without padding, rows, duration, and the wait in it for rows."""
        told: dict[str, int | float] = {
            "waiting_seconds": round(waited, 4),
            "waiting_share": round(waited / seconds, 4),
        }
        told["peak_memory_bytes"] = peak_memory(self.device)
        if self.peak is not None and self.of_token is not None:
            needed = tokens * (self.of_token + self.of_pair * tokens / rows)
            told["mfu"] = round(needed / (seconds * self.peak), 4)
        return told


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on a GPU, or else this whole process, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _known_peak(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def _operations(student: Any) -> tuple[float | None, float]:
    config = student.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None, 0.0
    used = {id(weight): weight.numel() for weight in student.parameters() if weight.requires_grad}
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:  # a tied one is multiplied with, as the head
        used.pop(id(embedding.weight), None)
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")]
    layers, heads, width = (size or 0 for size in sizes)
    attention = heads * (getattr(config, "head_dim", None) or width // max(heads, 1))
    return 6.0 * sum(used.values()), 12.0 * layers * attention
