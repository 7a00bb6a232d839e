"""The service's settings: each key of the TOML file with its unit, default and bounds.

They are read once at the start and passed down as plain values.
"""

from potstill.teacher_service.settings.replicas import AutoscaleSettings, RaySettings, ReplicaSettings
from potstill.teacher_service.settings.service import (
    AccessSettings,
    LimitSettings,
    LogSettings,
    ServiceSettings,
    TeacherSettings,
    TlsSettings,
    load_settings,
)

__all__ = [
    "AccessSettings",
    "AutoscaleSettings",
    "LimitSettings",
    "LogSettings",
    "RaySettings",
    "ReplicaSettings",
    "ServiceSettings",
    "TeacherSettings",
    "TlsSettings",
    "load_settings",
]
