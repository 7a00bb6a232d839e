"""Students that learn from cached or served teacher targets.

`config` is a run; `data` reads rows of corpora with their targets in the order of a seed; `losses`, `models` and
`optimizer` are what a `learner` has, which `loop` trains, alone or by `ray_train`; `run`, `checkpoint`, `metrics` and
`result` are what a run leaves in its folder; `evaluate` measures a student. `demo/` is the whole of it on a small
teacher.

Importing this package imports nothing: torch, transformers and Ray come in with the modules that need them.
"""
