"""Tests of distill on a head of one number."""

from __future__ import annotations

import torch
from torch import nn

from tests.passes.recover.test_distill import DATA
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded


class Reward(nn.Module):
    """A score per row, as a reward model gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = FeedForward(), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.body(x).mean(1))


def test_recovers_a_head_of_one_number() -> None:
    model, fresh = seeded(Reward), normal(50, 5, 8, seed=99)
    passes = "prune-neurons{keep=0.5}"
    found = [
        captures.optimize(model, normal(2, 5, 8), passes=text, data=DATA).program
        for text in (passes, f"{passes},distill{{steps=400,learning_rate=0.01}}")
    ]
    with torch.no_grad():
        before, after = (float((model(fresh) - program(fresh)).square().mean()) for program in found)
    assert after < 0.9 * before
