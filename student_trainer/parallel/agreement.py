"""Agreement of all workers on whether they can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from potstill.cache.errors import PotstillError, Unavailable
from potstill.clients.patience import has_no_answer
from potstill.student_trainer.parallel.group import Group


@contextmanager
def all_have_read(group: Group) -> Iterator[None]:
    """Give up on all workers if one could not read its rows in the block, which nobody waits in for another.

    Raises:
        PotstillError: the error, or Unavailable for that of another worker.
    """
    unread = None
    try:
        yield
    except PotstillError as error:
        if not has_no_answer(error):
            raise
        unread = error
    lacking = torch.tensor(float(unread is not None), device=group.device)
    group.all_reduce_sum(lacking)
    if unread is not None:
        raise unread
    if lacking.item() > 0:
        raise Unavailable("another worker got no answer")
