"""Measures of a student on rows that it never saw, and the results of a run.

`student` is what a run does while it trains, with `result`. Of `potstill evaluate`, `judged` and `other_model` have the
rows and models, `measuring` sums per document what `positions`, `labels` and `calibration` say of each position, and
`evidence` makes means of them by `means`; `tasks` runs those of the lm-evaluation-harness; `tables`, `report`,
`samples` and `shown_rows` show it.
"""
