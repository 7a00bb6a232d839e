"""Scaling a pool on Ray that is refused, or that Serve does not answer.

Serve's application is a stand-in; test_ray_pool.py has a real one.
"""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError

from potstill.cache.errors import InvalidInput, LimitExceeded, Unavailable
from potstill.teacher_service.replicas.ray_losses import lost
from potstill.teacher_service.replicas.ray_pool import RayPool
from potstill.teacher_service.replicas.ray_serve import ServeApp, ServeView
from potstill.teacher_service.routes.admin import ReplicasWanted, _change_replicas
from potstill.teacher_service.settings.replicas import AutoscaleSettings, RaySettings, ReplicaSettings


class SetApp(ServeApp):
    """Has as many replicas as it was told; raises `away` while there is one."""

    def __init__(self) -> None:
        super().__init__("big", RaySettings())
        self.number = 1
        self.away: Exception | None = None

    def scale(self, replicas: int) -> None:
        if self.away is not None:
            raise self.away
        self.number = replicas

    def look(self) -> ServeView:
        names = [f"replica-{i}" for i in range(self.number)]
        return ServeView("RUNNING", "", self.number, dict.fromkeys(names, "ready"))


@pytest.mark.parametrize("error", [RayActorError(), RayServeException("no controller\nand much more")])
async def test_while_serve_is_away_scaling_is_to_be_tried_again(error: Exception) -> None:
    app = SetApp()
    pool = RayPool("big", app, ReplicaSettings())
    app.away = error
    with pytest.raises(Unavailable, match="Ray Serve does not scale 'big' now: [^\n]*; try again$"):
        await pool.scale(2)
    app.away = None
    assert (await pool.scale(2)).replicas == 2


async def test_a_number_that_is_refused_does_not_end_autoscaling() -> None:
    app = SetApp()
    limits = AutoscaleSettings(min=1, max=2, tokens_per_replica=1000)
    pool = RayPool("big", app, ReplicaSettings(max_replicas=4, autoscale=limits))
    with pytest.raises(LimitExceeded, match="9 replicas were asked for"):
        await _change_replicas(pool, ReplicasWanted.model_validate({"autoscale": None, "replicas": 9}))
    with pytest.raises(InvalidInput, match="is autoscaled between 1 and 2"):
        await pool.scale(3)
    # Over the limits of autoscaling, but not over what the teacher may have.
    await _change_replicas(pool, ReplicasWanted.model_validate({"autoscale": None, "replicas": 3}))
    assert (app.number, pool.status.target, pool.status.max) == (3, 3, 4)


def test_a_replica_that_was_scaled_away_before_it_was_sent_the_call_is_not_called_lost() -> None:
    left = lost("r1", ReplicaUnavailableError("r1"), had_call=True)
    assert (left.detail, left.elsewhere, left.crashed) == ("replica r1 left before it was sent the rows", True, False)
