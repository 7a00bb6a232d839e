"""The base of all settings of a run, each of which stands beside what it sets: `settings` of a wing."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, strict=True)]
"""A number of things, one or more."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""


class Frozen(BaseModel):
    """Settings that never change, without unknown keys, infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
