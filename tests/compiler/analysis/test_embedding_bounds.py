"""Tests of lissom.compiler.analysis.embedding_bounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.embedding_bounds import outside_table
from lissom.compiler.ir import node as nodes
from lissom.frontends.capture.export import capture
from tests.support.models import seeded


class Lookup(nn.Module):
    """A table of seven rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


@pytest.mark.parametrize("typed", ["as it is", "with more rows", "as no tensor"])
def test_rows_are_those_of_table_however_program_is_typed(typed: str) -> None:
    program = capture(seeded(Lookup), (torch.tensor([[0, 1, 2], [3, 4, 5]]),), {}).program
    (table,) = (node for node in program.graph.nodes if node.op == "get_attr")
    if typed != "as it is":
        nodes.set_value(table, nodes.value(table).new_empty(99, 4) if typed == "with more rows" else 3)
    assert outside_table(program, [torch.tensor([[0, 6]])]) is None
    assert outside_table(program, [torch.tensor([[0, 7]])]).startswith("the inputs ask for row 7 of 'table.weight', which has")
