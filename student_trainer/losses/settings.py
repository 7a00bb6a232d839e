"""Settings of the loss; those of `[train]` begin with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from potstill.student_trainer.settings import Count, Frozen, Share

Points = tuple[tuple[Annotated[int, Field(ge=0, strict=True)], Share], ...]


def _share_told(value: Any, validated: ValidatorFunctionWrapHandler) -> Any:
    """Validate a share, with one message instead of one for each kind that it may be of."""
    told = "must be [step, share] pairs whose steps rise, or greater than or equal to 0 and less than or equal to 1"
    try:
        found = validated(value)
    except ValidationError as error:
        raise ValueError(told) from error
    if isinstance(found, tuple) and [step for step, _ in found] != sorted({step for step, _ in found} or {-1}):
        raise ValueError(told)
    return found


_OF_DISTILLATION = ("distil_every", "loss", "dense", "temperature", "weighting")
"""Settings without effect where nothing is distilled."""


class LossConfig(Frozen):
    """Settings of the loss."""

    alpha: Annotated[Share | Points, WrapValidator(_share_told)] = 0.5
    """(1 - alpha) * cross-entropy + alpha * distillation; or [step, alpha] pairs, linear between them."""
    distil_every: Count = 1
    """Distils on every n-th step, from the first on; the others are plain cross-entropy, and read no targets."""
    loss: Literal[
        "forward_kl", "reverse_kl", "jsd", "generalised_kl", "partial", "renormalised", "tvd", "draws", "hybrid"
    ] = "forward_kl"
    """The student's divergence from each teacher: of the top-k with its tail, or of draws, or of both."""
    dense: bool = False
    """Compares on the whole vocabulary, by the logprobs of all ids, which a small cache may keep beside the top-k."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Beta of the loss `jsd`: towards 0 it has the direction of forward KL, towards 1 that of reverse KL."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T at which student and teachers are compared; the divergence counts T * T times."""
    alm: Annotated[float, Field(ge=0)] = 0.0
    """Weight, beside both, of the likelihoods of chunks, by teachers with another tokenizer (`potstill project`)."""
    weighting: Literal["fixed", "entropy", "label"] = "fixed"
    """Teachers' weights: as given, or at each token by how sure a teacher is, or by how likely it finds the label."""
    weighting_beta: Annotated[float, Field(gt=0)] = 1.0
    """Nats that make one teacher count e times as much as another; only with a `weighting` by token."""

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if self.temperature != 1.0 and self.loss in ("draws", "hybrid"):
            raise ValueError(f"temperature {self.temperature:g} does not go with loss {self.loss!r}: draws are of 1")
        if self.dense and self.loss in ("draws", "hybrid"):
            raise ValueError(f"dense does not go with loss {self.loss!r}, which takes draws for what a top-k lacks")
        if self.jsd_beta != _default("jsd_beta") and self.loss != "jsd":
            raise ValueError(f"jsd_beta is {self.jsd_beta:g}, but loss is {self.loss!r}; leave it out")
        if self.alm and self.weighting != "fixed":
            raise ValueError(f"alm does not go with weighting {self.weighting!r}: a chunk has several tokens")
        if self.weighting_beta != _default("weighting_beta") and self.weighting == "fixed":
            raise ValueError(f"weighting_beta is {self.weighting_beta:g}, but weighting is 'fixed'; leave it out")
        unused = [name for name in _OF_DISTILLATION if getattr(self, name) != _default(name)]
        if unused and not self.distils:
            raise ValueError(f"{unused[0]} is {getattr(self, unused[0])!r}, but alpha is 0; leave it out")
        return self

    @property
    def alpha_points(self) -> tuple[tuple[int, float], ...]:
        """Alpha as (step, share) pairs, of which a constant has one."""
        return self.alpha if isinstance(self.alpha, tuple) else ((0, self.alpha),)

    @property
    def distils(self) -> bool:
        """True if targets are ever read: alpha is over 0 at some step, or `alm` is."""
        return self.alm > 0 or any(share for _, share in self.alpha_points)

    @property
    def needs_more_than_top_k(self) -> bool:
        """True if the top-k with its tail and labels is not all that is read of a teacher's targets."""
        beside = self.dense or self.temperature != 1.0 or self.weighting == "entropy"
        return beside or self.loss in ("draws", "hybrid")

    @property
    def needs_top_k(self) -> bool:
        """True if the loss is of the top-k."""
        return self.loss != "draws" and not self.dense


def _default(name: str) -> object:
    return LossConfig.model_fields[name].default
