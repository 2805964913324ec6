"""Tests of sizes that a model fixes, or takes as equal."""

from __future__ import annotations

import re

import torch
from torch import nn

from lissom.frontends.capture.export import capture
from tests.frontends.capture.test_dynamic import refusal
from tests.support.models import normal


class Resampler(nn.Module):
    """Learned queries for each row, whose number is taken as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(normal(1, 3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return nn.functional.scaled_dot_product_attention(queries, x, x)


def test_the_line_that_fixes_a_size_is_named():
    notes = capture(Resampler(), (normal(2, 5, 8),)).notes
    assert re.fullmatch(
        r"dimension 0 of 'x' is fixed at 2: test_fixed_sizes\.py:\d+ \(`queries = self\.queries\.expand\(len\(x\), -1, -1\)`\) "
        r"takes it as a number; use x\.shape",
        notes[-1],
    )
    found = refusal(lambda: capture(Resampler(), (normal(2, 5, 8),), dynamic={"x": {0: "batch"}}))
    assert "takes it as a number and fixes it at 2; leave it out of dynamic=" in found


class Added(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_two_names_of_one_dimension_are_refused():
    dynamic = {"x": {0: "rows"}, "y": {0: "others"}}
    assert refusal(lambda: capture(Added(), (normal(3, 8), normal(3, 8)), dynamic=dynamic)) == (
        "dynamic gives the names 'rows' and 'others' to dimensions that the model takes as equal; give them one name"
    )
