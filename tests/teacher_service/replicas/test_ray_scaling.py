"""Scaling a pool on Ray that is refused, or that Serve does not answer.

Serve's application is a stand-in; test_ray_pool.py has a real one.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError

from potstill.cache.errors import InvalidInput, LimitExceeded, Unavailable
from potstill.teacher_service.replicas.ray_losses import lost
from potstill.teacher_service.replicas.ray_pool import RayPool
from potstill.teacher_service.replicas.ray_serve import ServeApp, ServeView
from potstill.teacher_service.routes.admin import ReplicasWanted, _change_replicas
from potstill.teacher_service.settings.replicas import AutoscaleSettings, RaySettings, ReplicaSettings
from tests.support.waiting import eventually


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
        return ServeView("RUNNING", "", dict.fromkeys(names, "ready"))


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


class SlowApp(ServeApp):
    """Serve takes its time for the first change of the number."""

    def __init__(self) -> None:
        super().__init__("smol", RaySettings())
        self.number = 1
        self.begun = threading.Event()
        self.go = threading.Event()

    def scale(self, replicas: int) -> None:
        self.begun.set()
        self.go.wait(300)
        self.number = replicas

    def look(self) -> ServeView:
        return ServeView("RUNNING", "", {f"r{i}": "ready" for i in range(self.number)})


async def test_the_number_that_an_admin_sets_outlives_a_step_of_autoscaling_under_way() -> None:
    app = SlowApp()
    pool = RayPool(
        "smol", app, ReplicaSettings(autoscale=AutoscaleSettings(max=5, tokens_per_replica=10, up_seconds=0))
    )
    pool.follow_queue(lambda: 1000)
    step = asyncio.create_task(pool._follow_need())
    await eventually(app.begun.is_set)

    async def set_two() -> None:
        await pool.autoscale(None)
        assert (await pool.scale(2)).target == 2

    admin = asyncio.create_task(set_two())
    late = asyncio.create_task(pool._follow_need())
    await asyncio.sleep(0.05)
    app.go.set()
    await asyncio.gather(step, admin, late)
    assert (app.number, pool.status.target, pool.status.replicas) == (2, 2, 2)
