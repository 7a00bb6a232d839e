"""Log lines and spans, and the request's id that both carry."""
