"""What Dynamo knows of a graph's sizes comes into the program's signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from lissom.compiler.program import Program
from lissom.frontends.dynamo import capture_graph, read_graph


@torch.no_grad()
def test_sizes_dynamo_has_one_symbol_for_are_one_dimension() -> None:
    programs: list[Program] = []

    def backend(module: fx.GraphModule, args: Sequence[object]) -> Callable[..., object]:
        programs.append(capture_graph(read_graph(module), args, guard=True).program)
        return module.forward

    def changed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, y + 1

    torch.compiler.reset()
    compiled = torch.compile(changed, backend=backend, dynamic=True)
    for rows, columns in ((5, 5), (6, 6), (5, 7)):
        first, second = compiled(torch.ones(rows, columns), torch.ones(rows))
        assert first.shape == (rows, columns) and second.shape == (rows,)
    same, apart = programs  # the second size is of the first graph, the third is not
    assert len(same.signature.dimensions) == 1
    assert len(apart.signature.dimensions) == 2
    assert "eq" not in str(same)
