"""One teacher as a Ray Serve application: deployed, looked at, scaled and deleted. Every call blocks.

Serve has no public Python call that scales a running deployment without deploying it again, which restarts the
replicas. Its REST interface, which needs Ray's dashboard, calls the controller's `update_deployment_replicas`; so does
this module. The replicas' names and states come from the controller, too. Neither is public, so Ray's version is
pinned.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, LoggingConfig

from potstill.cache import errors
from potstill.cache.errors import PotstillError, TeacherFailed, Unavailable
from potstill.cache.ray_folder import ray_folder
from potstill.teacher_service.replicas.pool import OpenTeacher, ReplicaState
from potstill.teacher_service.replicas.ray_replica import FewestTokensRouter, Replica
from potstill.teacher_service.settings import RaySettings
from potstill.teacher_service.settings.replicas import ResourceSettings

_LOG = logging.getLogger(__name__)
_DEPLOYMENT = "teacher"
_STATES: dict[str, ReplicaState] = {"RUNNING": "ready", "STOPPING": "draining"}
# A replica's constructor reports its failure to Serve as text: the class and detail of our error are read out of that.
_OUR_ERROR = re.compile(r"cache\.errors\.(\w+): (.+)")


class RayConnection:
    """This process's connection to Ray, made for the first teacher and closed after the last."""

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()  # teachers start at the same time, each in a thread of its own
        self._users = 0
        self._made_here = False

    def join(self) -> None:
        """Connect, unless another teacher has; call `leave` as often.

        Raises:
            Unavailable: there is no cluster at the address.
        """
        with self._lock:
            if not ray.is_initialized():
                self._connect()
                self._made_here = True
            self._users += 1

    def start_serve(self) -> None:
        """Start Serve's controller on the cluster unless it runs; without its HTTP proxy, as calls come by handle."""
        with self._lock:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(proxy_location="Disabled", logging_config=_LOGGING)

    def leave(self) -> None:
        """Disconnect after the last user; a cluster that was started here ends with it."""
        with self._lock:
            self._users -= 1
            if not self._users and self._made_here:
                self._made_here = False
                ray.shutdown()

    def _connect(self) -> None:
        address = self.settings.address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Without this Ray packs and uploads the current folder when the service was started by `uv run`.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        started_here: dict[str, Any] = (
            {"include_dashboard": False, "_temp_dir": ray_folder()} if address == "local" else {}
        )
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **started_here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            cause = str(error).strip().partition("\n")[0]
            raise Unavailable(f"no Ray cluster at {address!r}: {cause}") from error


_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


def take_signals_back() -> None:
    """Put Python's handler of SIGTERM back, which `ray.init` replaces below Python by one that aborts the process."""
    # Python lets no other thread set handlers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@dataclass(frozen=True, slots=True)
class ServeView:
    """State of an application, as Serve tells it."""

    status: str
    """`RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, `UNHEALTHY`, ..., or `NOT_STARTED` when there is none."""
    message: str
    replicas: dict[str, ReplicaState]
    """State of each replica, by unique id; one that stops is `draining`."""

    @property
    def cause(self) -> PotstillError:
        """The failure, as the error of ours that a replica raised, or else Serve's in one line."""
        found = _OUR_ERROR.findall(self.message)
        if found:
            name, detail = found[-1]
            raised: type[PotstillError] = getattr(errors, name, TeacherFailed)
            return raised(detail)
        lines = [line for line in self.message.strip().splitlines() if line.strip()]
        return TeacherFailed(lines[-1].strip() if lines else f"Ray Serve says {self.status}")


class ServeApp:
    """The Serve application of one teacher: a single deployment, whose replicas are the teacher's."""

    def __init__(self, name: str, settings: RaySettings) -> None:
        self.name = name
        self._settings = settings

    def deploy(self, open_teacher: OpenTeacher, *, replicas: int, resources: ResourceSettings, gpus: float) -> Any:
        """Begin to start the replicas; returns Serve's handle, through which they are called."""
        deployment = serve.deployment(
            Replica,
            name=_DEPLOYMENT,
            num_replicas=replicas,
            max_ongoing_requests=self._settings.calls_per_replica,
            graceful_shutdown_timeout_s=self._settings.drain_seconds,
            graceful_shutdown_wait_loop_s=0.5,  # between two looks for calls that still run
            health_check_period_s=self._settings.health_seconds,
            health_check_timeout_s=self._settings.health_timeout_seconds,
            max_constructor_retry_count=2,  # enough for a node that is lost meanwhile; a wrong model fails every time
            request_router_config=RequestRouterConfig(request_router_class=FewestTokensRouter),
            **_placement(resources, gpus),
        )
        target = serve.RunTarget(
            target=deployment.bind(open_teacher, self._settings.wedged_seconds),
            name=self.name,
            route_prefix=None,  # no HTTP: the service calls by handle
            logging_config=_LOGGING,
            external_scaler_enabled=True,  # or the controller refuses `update_deployment_replicas`
        )
        # Not waited for: the pool looks on by itself, and tells a failed start from a slow one.
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        return handle

    def scale(self, replicas: int) -> None:
        """Ask for so many replicas; those that stay are left alone, those that go finish the calls they have."""
        controller = _get_global_client()._controller  # noqa: SLF001 -- see the module's docstring
        wanted = DeploymentID(name=_DEPLOYMENT, app_name=self.name)
        ray.get(controller.update_deployment_replicas.remote(wanted, replicas))

    def look(self) -> ServeView:
        """Ask Serve for the application's state."""
        details = _get_global_client().get_serve_details()["applications"].get(self.name)
        if details is None:
            return ServeView("NOT_STARTED", "", {})
        deployment = details["deployments"].get(_DEPLOYMENT)
        status = ApplicationStatus(details["status"]).value
        if deployment is None:
            return ServeView(status, details["message"], {})
        replicas = {one["replica_id"]: _STATES.get(one["state"], "starting") for one in deployment["replicas"]}
        message = "\n".join(filter(None, (details["message"], deployment["message"])))
        return ServeView(status, message, replicas)

    def delete(self) -> None:
        """Drain and stop all replicas. After a minute this returns, and Serve goes on by itself."""
        try:
            serve.delete(self.name, _blocking=True)
        except TimeoutError:
            _LOG.warning("the Serve application %r still drains", self.name)


def _placement(resources: ResourceSettings, gpus: float) -> dict[str, Any]:
    """Options of placement: one bundle per replica keeps all GPUs of an engine on one node. Not run on GPUs."""
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": gpus, "resources": resources.custom}
    if gpus <= 1:
        return {"ray_actor_options": options}
    bundle = {"CPU": resources.cpus, "GPU": gpus, **resources.custom}
    return {
        "ray_actor_options": options,
        "placement_group_bundles": [{name: amount for name, amount in bundle.items() if amount}],
        "placement_group_strategy": "STRICT_PACK",
    }
