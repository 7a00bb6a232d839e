"""Transport over HTTP: bounds of connections, bodies and answers in size and time; streamed answers; headers."""
