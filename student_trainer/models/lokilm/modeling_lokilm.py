"""A decoder with ALiBi, RMSNorm and SwiGLU for `transformers` 5, in one file that imports nothing but it and torch.

ALiBi adds slope_h * (j - i) to the score of query i and key j in head h (arXiv 2108.12409). A softmax is the same after
a shift of its whole row, so slope_h * j will do, and that is a product of the query with one more dimension of the key:

    q' = [q, c, c, c, 0...]      k' = [k, a_1, a_2, a_3, 0...]      c * (a_1 + a_2 + a_3) = slope_h * j * sqrt(d)

So any causal kernel computes ALiBi, with the scale 1 / sqrt(d) as it was, and a cache of keys needs nothing else. The
bias reaches thousands, where bfloat16 has steps of 16 and more: a_1 is the bias rounded to the keys' dtype, a_2 and a_3
what is left of it, and the kernel adds them up in float32. Zeros make the width a multiple of 8, as kernels want.

Where `attn_implementation` is not given it is `alibi`: flash-attn 2 with slopes, where it is installed and can be used
(half precision on a GPU; no cache, no mask), else the wider keys through `scaled_dot_product_attention`, with a mask of
booleans where rows share one or are padded. `sdpa` and `eager` have the bias in a mask of numbers [B, H, T, S]: slow,
and the reference. Run on CPUs; flash-attn and GPUs were not tried.

Shape legend:  B rows, T tokens, S tokens with those in the cache, H heads, D dimensions of a head, E added dimensions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

if is_flash_attn_2_available():
    from flash_attn import flash_attn_func
else:
    flash_attn_func = None

_PARTS = 3
"""Numbers that the bias of a key is split into: three of bfloat16 hold what one of float32 does."""


@strict
class LokiLMConfig(PretrainedConfig):
    """Sizes of a model; those of LokiLM (1.4B parameters) unless said otherwise."""

    model_type = "lokilm"
    keys_to_ignore_at_inference = ("past_key_values",)
    hidden_act = "silu"  # not to be chosen; engines ask for it

    vocab_size: int = 49_152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    max_position_embeddings: int = 8192
    """The longest row that servers and evaluations should try. The model itself has no limit."""
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit each other; called by `transformers`."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )


def alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Slopes of the heads, float32 [H]: 2^(-8h/H) for h = 1..H; for other H than powers of 2 as BLOOM has them."""
    whole = 2 ** (num_heads.bit_length() - 1)
    at = torch.arange(num_heads, dtype=torch.float32, device=device)
    return torch.exp2(torch.where(at < whole, (at + 1) * (-8 / whole), (2 * (at - whole) + 1) * (-4 / whole)))


class Alibi(NamedTuple):
    """Dimensions that the heads of a forward pass add to their queries and keys."""

    slopes: Tensor
    """[H] float32."""
    query: Tensor
    """[1, 1, 1, E]."""
    key: Tensor
    """[B, H, T, E], of the keys that the pass computes."""

    @classmethod
    def at(cls, positions: Tensor, num_heads: int, head_dim: int, dtype: torch.dtype) -> Alibi:
        """Make them for keys at `positions` [B, T], whose first may be any in a row, and for keys of `dtype`."""
        slopes = alibi_slopes(num_heads, positions.device)
        width = -(-(head_dim + _PARTS) // 8) * 8 - head_dim
        # A power of two changes no bit of the parts, and float16 would end at 65,504 without.
        factor = 2.0 ** round(math.log2(head_dim) / 2)
        left = slopes[:, None] * positions[:, None].to(torch.promote_types(dtype, torch.float32))
        left = left * (head_dim**0.5 / factor)
        key = torch.zeros(*left.shape, width, dtype=dtype, device=positions.device)
        for part in range(_PARTS):
            key[..., part] = left.to(dtype)
            left = left - key[..., part]
        query = torch.zeros(1, 1, 1, width, dtype=dtype, device=positions.device)
        query[..., :_PARTS] = factor
        return cls(slopes, query, key)

    def widen(self, states: Tensor, more: Tensor) -> Tensor:
        """Put `more`, the query's or the key's dimensions, behind [B, H, T, D]: [B, H, T, D + E]."""
        return torch.cat([states, more.to(states.dtype).expand(*states.shape[:-1], -1)], dim=-1)


def alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    alibi: Alibi,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with ALiBi by wider keys, or by flash-attn's slopes; an attention function of `transformers`.

    Args:
        module: the layer.
        query: [B, H, T, D].
        key: [B, H, S, D], or [B, H, S, D + E] of a cache.
        value: [B, H, S, D].
        attention_mask: [B, 1, T, S] bool, true where a key is seen; None for the causal mask.
        scaling: factor of the scores.
        alibi: the added dimensions.
        **kwargs: those of `scaled_dot_product_attention` in `transformers`.

    Returns:
        [B, T, H, D], and no weights.
    """
    cached = key.shape[-1] != query.shape[-1]
    if _flash_can(query, attention_mask) and not cached:
        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        return flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, alibi_slopes=alibi.slopes), None
    width = value.shape[-1]
    # One width for all three, without which torch takes a slow way.
    wide = functional.pad(value, (0, alibi.query.shape[-1]))
    key = key if cached else alibi.widen(key, alibi.key)
    query = alibi.widen(query, alibi.query)
    found, _ = sdpa_attention_forward(module, query, key, wide, attention_mask, scaling=scaling, **kwargs)
    return found[..., :width], None


def _flash_can(query: Tensor, attention_mask: Tensor | None) -> bool:
    half = query.dtype in {torch.bfloat16, torch.float16}
    return flash_attn_func is not None and query.is_cuda and half and attention_mask is None


def eager_attention_forward(
    module: nn.Module,  # noqa: ARG001 -- an attention function of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Attend with the bias in the mask [B, H, T, S], written out; as `alibi_attention`, with the weights."""
    precise = torch.promote_types(query.dtype, torch.float32)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(dim=-1, dtype=precise)
    weights = weights.to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# The names are looked up in these tables: of the function, and of the mask that it gets.
AttentionInterface.register("alibi", alibi_attention)
AttentionMaskInterface.register("alibi", sdpa_mask)


class LokiLMAttention(nn.Module):
    """Causal attention of H heads with ALiBi, without biases."""

    def __init__(self, config: LokiLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        alibi: Alibi | None,
        past_key_values: DynamicCache | None,
    ) -> Tensor:
        """Attend from hidden states [B, T, H * D]; `alibi` is None where the bias is in the mask."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            each(hidden_states).view(heads).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key = key if alibi is None else alibi.widen(key, alibi.key)
            key, value = past_key_values.update(key, value, self.layer_idx)
        chosen = self.config._attn_implementation  # noqa: SLF001 -- as in every model of transformers
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        more = {} if alibi is None else {"alibi": alibi}
        found, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, **more)
        out: Tensor = self.o_proj(found.reshape(*hidden_states.shape[:-1], -1))
        return out


class LokiLMMLP(nn.Module):
    """SwiGLU, without biases (arXiv 2002.05202)."""

    def __init__(self, config: LokiLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform each position of [B, T, H * D]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return out


class LokiLMDecoderLayer(GradientCheckpointingLayer):
    """Attention and SwiGLU, each after a norm and added to what it read."""

    def __init__(self, config: LokiLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LokiLMAttention(config, layer_idx)
        self.mlp = LokiLMMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        alibi: Alibi | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        """Transform [B, T, H * D]."""
        attended = self.self_attn(self.input_layernorm(hidden_states), attention_mask, alibi, past_key_values)
        hidden_states = hidden_states + attended
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class LokiLMPreTrainedModel(PreTrainedModel):
    """Parts that both models share."""

    config: LokiLMConfig
    config_class = LokiLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("LokiLMDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True
    # Of flash-attn by transformers' own function, which has no slopes, and flex attention nothing is supported.
    _supports_flash_attn = False
    _supports_flex_attn = False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:  # noqa: FBT001, FBT002
        """Name the attention function: `alibi` where none was asked for."""
        found: str = super().get_correct_attn_implementation(requested_attention or "alibi", is_init_check)
        return found


class LokiLMModel(LokiLMPreTrainedModel):
    """The model below the head."""

    def __init__(self, config: LokiLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LokiLMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001
        output_hidden_states: bool | None = None,  # noqa: FBT001
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states [B, T, H * D] of tokens [B, T].

        Rows may share one: where `position_ids` [B, T] begin again, and neither mask nor cache is given, a new one
        begins.
        """
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=self._widens,
        )
        dtype = _dtype_of_keys(hidden_states)
        alibi = self._alibi(position_ids, dtype) if self._widens else None
        if not self._widens:
            mask = self._biased(mask, dtype, seen)
        every = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, alibi=alibi, past_key_values=past_key_values)
            if output_hidden_states:
                every.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*every[:-1], hidden_states) if output_hidden_states else None,
        )

    @property
    def _widens(self) -> bool:
        return bool(self.config._attn_implementation == "alibi")  # noqa: SLF001

    def _alibi(self, position_ids: Tensor, dtype: torch.dtype) -> Alibi:
        heads = self.config.num_attention_heads
        return Alibi.at(position_ids, heads, self.config.hidden_size // heads, dtype)

    def _biased(self, mask: Tensor, dtype: torch.dtype, seen: int) -> Tensor:
        """Make the mask of numbers [B, H, T, S] of one that says what is seen."""
        at = torch.arange(mask.shape[-1], device=mask.device)
        distances = at - at[: mask.shape[-2], None] - seen
        slopes = alibi_slopes(self.config.num_attention_heads, mask.device)[:, None, None]
        bias = slopes * distances.to(torch.promote_types(dtype, torch.float32))
        unseen = ~mask if mask.dtype == torch.bool else mask < 0
        return bias.masked_fill(unseen, torch.finfo(dtype).min).to(dtype)


def _dtype_of_keys(hidden_states: Tensor) -> torch.dtype:
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


class LokiLMForCausalLM(LokiLMPreTrainedModel, GenerationMixin):
    """The model with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 -- read by transformers

    def __init__(self, config: LokiLMConfig) -> None:
        super().__init__(config)
        self.model = LokiLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [B, T, V], and with `labels` the cross-entropy; else as `LokiLMModel`."""
        below = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(below.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=below.past_key_values,
            hidden_states=below.hidden_states,
        )


__all__ = ["LokiLMConfig", "LokiLMForCausalLM", "LokiLMModel", "LokiLMPreTrainedModel"]
