"""Who may do what: API keys and roles, quotas, the audit log, and the middleware that asks them."""
