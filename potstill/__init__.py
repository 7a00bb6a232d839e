"""Teacher-logit cache and distillation server: what people import most, by one name.

The four packages stand at the top level of the repository and are linked from here, so that they are imported as
`potstill.cache` and so on and a wheel holds `potstill` alone (`docs/decisions/0012`). `import potstill` is fast: each
name is imported from its package when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potstill.cache.cache import Cache
    from potstill.cache.errors import PotstillError
    from potstill.cache.types import Fields, Targets
    from potstill.clients.http_targets import HttpCache
    from potstill.clients.http_teacher import HttpTeacher
    from potstill.student_trainer.losses import distillation_loss

__all__ = ["Cache", "Fields", "HttpCache", "HttpTeacher", "PotstillError", "Targets", "distillation_loss"]

_HOMES = {
    "Cache": "cache.cache",
    "Fields": "cache.types",
    "HttpCache": "clients.http_targets",
    "HttpTeacher": "clients.http_teacher",
    "PotstillError": "cache.errors",
    "Targets": "cache.types",
    "distillation_loss": "student_trainer.losses",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
