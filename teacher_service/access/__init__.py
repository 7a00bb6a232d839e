"""Access to the service: API keys with roles, quotas, the audit log, and the middleware that applies them."""
