"""The training loop: a run's corpora and targets, the steps of a learner, and what goes on around them."""
