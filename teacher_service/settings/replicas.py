"""Settings of replicas on Ray: its address, the resources of a replica, and the number of replicas."""

from __future__ import annotations

from typing import Annotated, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
_Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FrozenSettings(BaseModel):
    """A table of the settings. Defaults are checked too, so that a wrong one fails at the first start."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RaySettings(FrozenSettings):
    """The table `[ray]`: with it, every teacher is a Ray Serve deployment; without it, an engine in process."""

    address: Annotated[str, StringConstraints(min_length=1)] = "auto"
    """`auto` joins the cluster of this machine, `local` starts one for this service, `HOST:PORT` names its head."""
    app_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "potstill"
    """Prefix of the Serve applications' names; services that share a cluster need different ones."""
    calls_per_replica: Count = 64
    """Calls that one replica works on at a time; more wait in the service."""
    wedged_seconds: _Seconds = 120.0
    """Seconds without a finished step after which an engine that has work counts as wedged: its replica is replaced,
    and its rows are scored again. A step scores at most `max_batch_tokens` tokens, an option of the teacher. Where one
    may take longer, raise this or lower that, or slow rows cost one replica after the other."""
    health_seconds: _Seconds = 5.0
    """Seconds between two questions of Serve after a replica's health; three bad answers in a row replace it."""
    health_timeout_seconds: _Seconds = 30.0
    """Seconds after which a missing answer counts as a bad one."""
    drain_seconds: _Seconds = 3600.0
    """Seconds that a replica that is scaled away has to finish the calls it was sent."""


class AutoscaleSettings(FrozenSettings):
    """Limits between which a teacher is scaled by the tokens that wait for it."""

    min: Count = 1
    """Least number of replicas."""
    max: Count
    """Largest number of replicas."""
    tokens_per_replica: Count
    """Waiting tokens that call for one more replica."""
    up_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Seconds that a need must last before replicas are added."""
    down_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 120.0
    """Seconds that the need must have been lower before replicas are removed."""

    @model_validator(mode="after")
    def _max_is_no_less_than_min(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, less than min={self.min}")
        return self


class ResourceSettings(FrozenSettings):
    """Resources that Ray reserves for each replica."""

    cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """CPUs per replica."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """GPUs per replica. None: `tensor_parallel` of the teacher's options where the cluster has GPUs, else 0."""
    custom: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """Ray's custom resources by name."""


class ReplicaSettings(FrozenSettings):
    """Number of replicas of one teacher, which an admin may change, or limits for autoscaling."""

    replicas: Count = 1
    """Replicas at the start; more than one need the table `[ray]`."""
    max_replicas: Count = 8
    """Most replicas that an admin may ask for."""
    autoscale: AutoscaleSettings | None = None
    resources: ResourceSettings = ResourceSettings()

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if self.replicas > self.max_replicas:
            raise ValueError(f"replicas is {self.replicas}, over max_replicas={self.max_replicas}")
        if self.autoscale is not None and "replicas" in self.model_fields_set:
            raise ValueError("replicas and autoscale exclude each other; autoscale.min is what it begins with")
        if self.autoscale is not None and self.autoscale.max > self.max_replicas:
            raise ValueError(f"autoscale.max is {self.autoscale.max}, over max_replicas={self.max_replicas}")
        return self
