"""Replicas: the engines of one teacher, started, watched, replaced and scaled, in this process or on Ray Serve."""

from potstill.teacher_service.replicas.pool import LocalPool, OpenTeacher, ReplicaPool, ReplicaState, ReplicaStatus

__all__ = ["LocalPool", "OpenTeacher", "ReplicaPool", "ReplicaState", "ReplicaStatus"]
