"""Access to the service: API keys with roles, quotas, the audit log, and the middleware that applies them."""

from potstill.teacher_service.access.auth import Caller, Role, allow, caller
from potstill.teacher_service.access.middleware import Access, AccessApp
from potstill.teacher_service.access.quotas import Quota, QuotaMeter

__all__ = ["Access", "AccessApp", "Caller", "Quota", "QuotaMeter", "Role", "allow", "caller"]
