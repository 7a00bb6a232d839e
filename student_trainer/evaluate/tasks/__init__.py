"""Tasks of the lm-evaluation-harness, run on a student that is loaded already.

`harness` alone imports it. `questions` makes tasks of files of questions, whose `shapes` it knows by their fields;
`outcome` is what was found.
"""
