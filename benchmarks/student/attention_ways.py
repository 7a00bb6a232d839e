"""Ways to attend with ALiBi, measured on one device: their error against float64, and their time.

Shape legend:  H heads, L tokens, D dimensions of a head.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils import is_flash_attn_2_available

from potstill.student_trainer.models.lokilm.modeling_lokilm import Alibi, alibi_attention, alibi_slopes

MASKED, PLAIN = "SDPA, mask of numbers", "no ALiBi"

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Result:
    """Measures of one way."""

    error: float
    forward: float
    both: float
    """Seconds of a forward pass, and of one with its backward pass."""

    def row(self, name: str, base: Result) -> str:
        """One line of a table: times in ms, and over those of `base`."""
        error = "" if name == PLAIN else f"{self.error:.2g}"
        forward, both = self.forward / base.forward, self.both / base.both
        return f"{name} | {error} | {self.forward * 1e3:.2f} ms, {forward:.2f} | {self.both * 1e3:.2f} ms, {both:.2f} |"


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with ALiBi in float64 on the CPU, [1, H, L, D], one head at a time."""
    at = torch.arange(q.shape[2])
    distances = (at - at[:, None]).double()
    heads = []
    for head, slope in enumerate(alibi_slopes(q.shape[1]).double()):
        one, keys, values = (each[0, head].cpu().double() for each in (q, k, v))
        scores = one @ keys.T / q.shape[3] ** 0.5 + (slope * distances).masked_fill_(distances > 0, -torch.inf)
        heads.append(scores.softmax(-1) @ values)
    return torch.stack(heads)[None]


def ways(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Way]:
    """Ways to attend, by name, for q, k and v of H, L, D: to the attended [1, H, L, D]."""
    num_heads, length, dim = shape
    at = torch.arange(length, device=device)
    alibi = Alibi.at(at[None], num_heads, dim, dtype)
    distances = at - at[:, None]
    mask = alibi_slopes(num_heads, device)[:, None, None] * distances.float()
    mask = mask.masked_fill_(distances > 0, torch.finfo(dtype).min)[None].to(dtype)

    def by(alibi: Alibi, *, wide: bool) -> Way:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # A key that is wider already is attended to as one of a cache: not by flash-attn.
            k = alibi.widen(k, alibi.key) if wide else k
            return alibi_attention(nn.Identity(), q, k, v, None, scaling=dim**-0.5, alibi=alibi)[0].transpose(1, 2)

        return attend

    found: dict[str, Way] = {
        MASKED: lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "wider keys": by(alibi, wide=True),
    }
    for parts in (1, 2) if dtype != torch.float32 else ():
        fewer = alibi._replace(key=alibi.key.clone())
        fewer.key[..., parts:] = 0
        found[f"wider keys, only {parts} of 3 parts"] = by(fewer, wide=True)
    if is_flash_attn_2_available() and device.type == "cuda" and dtype != torch.float32:
        found["flash-attn 2, slopes"] = by(alibi, wide=False)
    found[PLAIN] = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    return found


def measured(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Result]:
    """Measure every way for H, L, D; the ways take turns, and a first round does not count."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, *shape, generator=generator).to(device, dtype) for _ in range(3)]
    learnt = [each.clone().requires_grad_() for each in given]
    expected, all_ways = exact(*given), ways(shape, dtype, device)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in all_ways}
    for _ in range(rounds + 1):
        for name, way in all_ways.items():
            with torch.no_grad():
                times[name][0].append(_seconds(way, given, backward=False))
            times[name][1].append(_seconds(way, learnt, backward=True))
    found = {}
    for name, way in all_ways.items():
        with torch.no_grad():
            error = float((way(*given).cpu().double() - expected).abs().max())
        found[name] = Result(error, *(statistics.median(each[1:]) for each in times[name]))
    return found


def _seconds(way: Way, tensors: list[Tensor], *, backward: bool) -> float:
    began = time.perf_counter()
    found = way(*tensors)
    if backward:
        found.sum().backward()  # type: ignore[no-untyped-call]
    if found.is_cuda:
        torch.cuda.synchronize(found.device)
    return time.perf_counter() - began
