"""Talking to a Potstill service: scoring, reading, administration, and the `potstill` command.

`http_teacher` scores rows (`HttpTeacher`, and `SyncHttpTeacher` for threads); `http_targets` and `http_corpus` read
what is committed (`HttpCache`); `http_admin` and `fill_watch` change what a service does. All send through
`connection`, which tries again as `retry` says. `doctor/` checks a service before hours of work rest on it; `commands/`
is what people type.
"""
