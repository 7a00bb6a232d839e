"""An optimizer computes as its own device does, whichever one its state is from."""

from __future__ import annotations

import torch

from potstill.student_trainer.train.optimizer import make_optimizer
from potstill.student_trainer.train.settings import LoopConfig


def test_a_state_of_a_gpu_does_not_make_it_a_fused_one() -> None:
    def stepped() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        layer = torch.nn.Linear(2, 2)
        optimizer = make_optimizer(layer, LoopConfig(out="run", steps=1))
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return layer, optimizer

    _, theirs = stepped()
    state = theirs.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True
    _, ours = stepped()
    ours.load_state_dict(state)
    assert [group["fused"] for group in ours.param_groups] == [None, None]
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    ours.step()
