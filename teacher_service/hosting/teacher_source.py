"""The factory of hosted teachers: an engine in this process, or replicas on Ray where `[ray]` is set."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from potstill.cache.entry_points import open_teacher
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep, OpenPool
from potstill.teacher_service.replicas import LocalPool
from potstill.teacher_service.settings import RaySettings, TeacherSettings

if TYPE_CHECKING:
    from potstill.teacher_service.replicas.ray_serve import RayConnection


class TeacherSource:
    """Makes the teachers of one service, at its start and while it runs.

    Args:
        keep: where their answers are kept; None keeps none.
        ray: the settings of Ray; with None every engine runs in this process.
    """

    def __init__(self, keep: Keep | None = None, ray: RaySettings | None = None) -> None:
        self._keep = keep
        self._ray = ray
        self._connection: RayConnection | None = None

    def host(self, settings: TeacherSettings) -> HostedTeacher:
        """Make a teacher that is not started yet. Its model and options are checked when it starts.

        Raises:
            InvalidInput: several replicas of a teacher that cannot have them.
        """
        settings.check_replicas(ray=self._ray is not None)
        opens = partial(open_teacher, settings.model, options=settings.factory_options)
        return HostedTeacher(settings.name, opens, self._keep, open_pool=self._open_pool(settings), settings=settings)

    def _open_pool(self, settings: TeacherSettings) -> OpenPool:
        if self._ray is None or settings.remote:
            return LocalPool.open
        from potstill.teacher_service.replicas.ray_pool import RayPool  # noqa: PLC0415  Ray, only when it is used
        from potstill.teacher_service.replicas.ray_serve import RayConnection  # noqa: PLC0415

        self._connection = self._connection or RayConnection(self._ray)
        # Needed before the engine's own check of its options, which refuses other types.
        gpus = settings.options.get("tensor_parallel", 1)
        return partial(
            RayPool.open,
            name=settings.name,
            connection=self._connection,
            settings=settings,
            gpus_per_engine=gpus if isinstance(gpus, int) else 1,
        )
