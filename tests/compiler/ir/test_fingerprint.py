"""Tests of lissom.compiler.ir.fingerprint."""

from __future__ import annotations

import torch
from torch import nn

import lissom
from lissom.compiler.ir.fingerprint import program_fingerprint, structure_fingerprint
from tests.support.models import normal, seeded


class Branches(nn.Module):
    """Computes two branches in an order of its own, as models do that iterate over a set."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        self.order = order
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = {name: self.get_submodule(name)(x) for name in self.order}
        return found["one"] - found["other"]


def program(*order):
    return lissom.optimize(seeded(lambda: Branches(*order)), normal(2, 4), checks="off").program


def test_the_order_of_a_capture_does_not_count():
    first, second = program("one", "other"), program("other", "one")
    assert first.text() != second.text()
    assert structure_fingerprint(first) == structure_fingerprint(second)
    assert program_fingerprint(first) == program_fingerprint(second)


def test_what_is_computed_and_with_which_weights_counts():
    class Swapped(Branches):
        def forward(self, x):
            return self.other(x) - self.one(x)

    first = program("one", "other")
    swapped = lissom.optimize(seeded(lambda: Swapped("one", "other")), normal(2, 4), checks="off").program
    assert structure_fingerprint(first) != structure_fingerprint(swapped)
    other = lissom.optimize(Branches("one", "other"), normal(2, 4), checks="off").program
    assert structure_fingerprint(first) == structure_fingerprint(other)
    assert program_fingerprint(first) != program_fingerprint(other)
