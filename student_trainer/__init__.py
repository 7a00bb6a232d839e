"""Students that learn from cached or served teacher targets.

`config` is a run; `data` reads rows of corpora with their targets in the order of a seed; `losses`, `models` and
`parallel` are what a learner has, which `train` trains, alone or where `launch` starts workers; `checkpoint`, `metrics`
and `evaluate` are what a run leaves in its folder. `demo` is the whole of it on a small teacher. Each wing's `settings`
stand in it.

Importing this package imports nothing: torch, transformers and Ray come in with the modules that need them.
"""
