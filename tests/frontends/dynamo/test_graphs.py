"""What Dynamo knows of a graph's sizes comes into the program's signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from lissom.compiler.ir.program import Program
from lissom.frontends.dynamo.graphs import capture_graph, guard_sizes, read_graph

Function = Callable[..., tuple[torch.Tensor, ...]]


def programs_of(function: Function, *calls: tuple[torch.Tensor, ...]) -> list[Program]:
    """The programs of the graphs that Dynamo makes of the function with `dynamic=True` for these calls; each graph is run."""
    programs: list[Program] = []

    def backend(module: fx.GraphModule, args: Sequence[object]) -> Callable[..., object]:
        graph = read_graph(module)
        programs.append(capture_graph(graph, args).program)
        guard_sizes(graph, programs[-1].signature)
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for args in calls:
        for wanted, found in zip(function(*args), compiled(*args), strict=True):
            assert torch.equal(wanted, found)
    return programs


@torch.no_grad()
def test_sizes_dynamo_has_one_symbol_for_are_one_dimension() -> None:
    def changed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 2, y + 1

    sizes = ((5, 5), (6, 6), (5, 7))
    same, apart = programs_of(changed, *((torch.ones(rows, columns), torch.ones(rows)) for rows, columns in sizes))
    # The second call is of the first graph, the third is not.
    assert len(same.signature.dimensions) == 1
    assert len(apart.signature.dimensions) == 2
    assert "eq" not in same.text()


@torch.no_grad()
def test_size_dynamo_finds_to_be_one_number_is_fixed() -> None:
    def checked(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2,) if x.shape[1] == 4 else (x * 3,)

    four, other = programs_of(checked, *((torch.ones(rows, columns),) for rows, columns in ((2, 4), (3, 4), (3, 5))))
    assert [leaf.type.shape[1] for leaf in four.signature.tensors] == [4]
    assert [dimension.name for dimension in four.signature.dimensions.values()] == ["batch"]
    assert len(other.signature.dimensions) == 2


@torch.no_grad()
def test_size_that_can_hardly_vary_is_fixed() -> None:
    def strided(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x[:, ::4] + torch.arange(4.0),)

    # Thirteen to sixteen columns are four strides. Of what is tried beside sixteen none is, beside fifteen there is sixteen.
    sizes = ((2, 16), (5, 16), (2, 15), (3, 14))
    wide, narrow = programs_of(strided, *((torch.ones(rows, columns),) for rows, columns in sizes))
    assert [leaf.type.shape[1] for leaf in wide.signature.tensors] == [16]
    assert len(wide.signature.dimensions) == 1
    assert len(narrow.signature.dimensions) == 2


@torch.no_grad()
def test_an_input_may_be_named_as_a_builtin_is() -> None:
    def named(input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (input.reshape(input.shape[1], input.shape[0]),)

    (program,) = programs_of(named, (torch.ones(2, 3),), (torch.ones(4, 5),))
    assert len(program.signature.dimensions) == 2
