"""The service's teachers: opened, added and removed; corpora filled by them in the background; metrics and coverage."""

from potstill.teacher_service.hosting.fill_jobs import FillOrder
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.hosting.metrics import Metrics
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.hosting.teacher_source import TeacherSource

__all__ = ["FillOrder", "HostedTeacher", "Keep", "Metrics", "Service", "TeacherSource"]
