"""Admission: bounds of one request and of all together, and the queue in front of each engine, fair between keys."""

from potstill.teacher_service.admission.admission import Admission, AdmittedTeacher
from potstill.teacher_service.admission.shared_bound import SharedBound

__all__ = ["Admission", "AdmittedTeacher", "SharedBound"]
