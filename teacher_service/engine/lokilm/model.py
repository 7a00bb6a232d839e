"""LokiLM's model for vLLM: a Llama with the slopes of ALiBi in place of rotary embeddings.

Run with vLLM 0.32 on CPUs; neither on a GPU nor on several with tensor parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models import bloom, llama

from potstill.teacher_service.engine.lokilm import require_slopes


class LokiLMAttention(nn.Module):
    """Attention with ALiBi, of this rank's heads."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        quant_config: Any = None,
        cache_config: Any = None,
        prefix: str = "",
        **_: Any,
    ) -> None:
        """Take the arguments that a decoder layer of vLLM's Llama gives its attention; the others are not the model's.

        Raises:
            InvalidInput: vLLM chose a backend that ignores slopes.
        """
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        here = num_heads // ranks
        head_dim = hidden_size // num_heads
        self.qkv_proj = QKVParallelLinear(
            hidden_size, head_dim, num_heads, bias=False, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            hidden_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        slopes = bloom._get_alibi_slopes(num_heads)[rank * here : (rank + 1) * here]  # noqa: SLF001 -- checked at start
        self.attn = Attention(
            here,
            head_dim,
            head_dim**-0.5,
            alibi_slopes=slopes.tolist(),
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        require_slopes(self.attn.attn_backend.get_name())

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Attend from hidden states [tokens, hidden size]; the backend knows the positions."""
        qkv, _ = self.qkv_proj(hidden_states)
        out: torch.Tensor = self.o_proj(self.attn(*qkv.chunk(3, dim=-1)))[0]
        return out


class LokiLMDecoderLayer(llama.LlamaDecoderLayer):
    """Llama's layer with that attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=LokiLMAttention)


class LokiLMForCausalLM(llama.LlamaForCausalLM):
    """Llama's model of such layers: weights have the same names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LokiLMDecoderLayer)
