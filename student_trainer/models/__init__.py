"""Students: what is asked for is made to fit the corpus, built, checked and written."""

from potstill.student_trainer.models.build import build_student, load_student, save_student

__all__ = ["build_student", "load_student", "save_student"]
