"""Tests of the loop: what becomes of a run whose held-out loss rises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.training.loop import Plan, Run


@pytest.mark.parametrize(
    ("held_out", "slowed"),
    [
        ((1.0, 1.2, 1.3, 2.1), True),  # by little at first: as a rate rises
        ((1.0, 0.9, 1.3, 2.1), False),  # better than the start once
        ((1.0, 2.1, 2.1, 1.9), False),  # on the way back
    ],
)
def test_run_restarts_when_its_loss_doubles_without_gain(held_out, slowed) -> None:
    """The held-out loss is measured at the start, after 4 and 8 steps, and after the first quarter of 40."""
    losses = iter([*held_out, *[2.0] * 20])
    weight = nn.Parameter(torch.ones(2))
    plan = Plan(None, 40, 0.1, "fp32", 0)
    run = Run({"weight": weight}, {}, lambda *_: weight.square().sum(), 3, lambda: next(losses), plan, lambda *_: None)
    found = run.train()
    assert [point.step for point in found.curve[:4]] == [0, 4, 8, 10]
    assert found.slowed == (10 if slowed else None)
