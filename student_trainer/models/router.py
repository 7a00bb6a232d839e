"""The router loss of a student with experts: `transformers`' own auxiliary loss, of the global batch.

With f_e the experts e chosen a position, and p_e the routers' mean probability of e, both over all positions (padding
left out) and layers:

    router loss = E * sum_e f_e p_e

It is no mean over positions: that of a batch is not the mean of those of its parts. So that micro-batches and workers
change the result by rounding only, f is counted over the global batch before any gradient is taken; it has none
itself, and with f known the loss is a sum over positions. This costs a second forward pass, without gradients.
Balance over the global batch also lets experts specialise more than balance within each micro-batch: Qiu et al.,
arXiv 2501.11873.

Shape legend:  B rows, T tokens, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.data import Batch
from potstill.student_trainer.models.precision import autocast

_RELATIVE_ERROR = 1e-4
"""Between our sum and the model's own: float32 in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoss:
    """The shape of a model's router loss."""

    coefficient: float
    """Factor of the router loss in the whole loss, as the model's config has it."""
    chosen: int
    """Experts that a position goes to in a layer."""
    experts: int

    def count(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Count the positions of a micro-batch that go to each expert, float64 [E], without gradient.

        Args:
            router_logits: [B * T, E] of each of L layers.
            mask: [B, T] bool; False where padded.
        """
        counts = torch.zeros(self.experts, dtype=torch.float64, device=mask.device)
        real = mask.reshape(-1)
        with torch.no_grad():
            for logits in router_logits:
                # By probability, as the model's own loss does: in bfloat16 softmax has other ties than the logits.
                best = logits[real].softmax(dim=-1).topk(self.chosen, dim=-1).indices
                counts += torch.bincount(best.reshape(-1), minlength=self.experts)
        return counts

    def count_all(self, model: PreTrainedModel, batches: Sequence[Batch], dtype: str) -> Tensor:
        """Count by a forward pass over micro-batches, which draws as much dropout as training's; else as `count`."""
        counts = torch.zeros(self.experts, dtype=torch.float64, device=model.device)
        with torch.no_grad(), autocast(model.device, dtype):
            for batch in batches:
                out = model(**batch.inputs)
                counts += self.count(out.router_logits, batch.real)
        return counts

    def of_part(self, router_logits: tuple[Tensor, ...], mask: Tensor, counts: Tensor) -> Tensor:
        """A micro-batch's share [] of the global batch's router loss, with its gradient; the shares add up to it.

        Args:
            router_logits: as `count`'s.
            mask: as `count`'s.
            counts: [E] float64, summed over the global batch.
        """
        real, rows = mask.reshape(-1), counts.sum() / self.chosen
        weights = (self.experts * counts / rows / rows).float()
        sums = torch.stack([logits[real].softmax(dim=-1).float().sum(dim=0) for logits in router_logits])
        return (sums.sum(dim=0) * weights).sum()


def router_loss_of(model: PreTrainedModel) -> RouterLoss | None:
    """Find out how a model's router loss is made; None unless its config has `output_router_logits`.

    Raises:
        InvalidInput: the model has no router loss, or makes it in another way than this module.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    tokens = torch.arange(8, device=model.device).remainder(config.vocab_size).reshape(2, 4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 2:] = False
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
    model.train(training)
    own, logits = getattr(out, "aux_loss", None), getattr(out, "router_logits", None)
    refused = f"student.config.output_router_logits is true, but model_type {config.model_type!r}"
    if not isinstance(own, Tensor) or not logits:
        raise InvalidInput(f"{refused} has no router loss; leave it out")
    found = RouterLoss(
        coefficient=_number(model, config, ("router_aux_loss_coef", "aux_loss_coef")),
        chosen=int(_number(model, config, ("num_experts_per_tok", "top_k"))),
        experts=logits[0].shape[-1],
    )
    ours = found.of_part(logits, mask, found.count(logits, mask))
    if abs(float(ours) - float(own)) > _RELATIVE_ERROR * abs(float(own)):
        raise InvalidInput(f"{refused} makes its router loss in a way that is not known here; leave it out")
    return found


def _number(model: PreTrainedModel, config: object, names: tuple[str, ...]) -> float:
    for holder in (model, config):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int | float):
                return value
    raise InvalidInput(f"student.config has no {names[0]}, which its output_router_logits needs")
