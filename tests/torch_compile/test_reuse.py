"""One program for the graphs that Dynamo makes for other sizes and gradient modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.models import Case, feed_forward, normal, seeded, tiny_bert, tokens
from tests.torch_compile.test_torch_compile import TOLERANCE, compiled, error, fresh, lowered

__all__ = ["fresh"]


@pytest.mark.parametrize("build", [feed_forward, pytest.param(tiny_bert, marks=pytest.mark.slow)])
def test_one_compile_for_every_batch_and_mode(build: object) -> None:
    """Dynamo makes a graph for the first size, for size 1 and for each mode; all of them run one program."""
    case: Case = build()  # pyright: ignore[reportCallIssue]
    model = compiled(case.model)
    for mode in (torch.no_grad, torch.inference_mode):
        for batch, length in ((2, 5), (3, 5), (4, 7), (1, 5), (2, 5)):
            with mode():
                given = tokens(batch, length) if build is tiny_bert else normal(batch, length, 8)
                assert error(case.model(given), model(given)) <= TOLERANCE
    assert lowered() == [True]


def test_one_compile_across_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x.relu())

    module = seeded(Broken)
    model = compiled(module)
    with torch.no_grad():
        for rows in (2, 3, 5, 1):
            assert error(module(normal(rows, 8)), model(normal(rows, 8))) <= TOLERANCE
    assert lowered() == [True, True]


def test_other_constants_and_other_weights_are_compiled() -> None:
    """Graphs of the same operators, with another constant or other weights, are not the same."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
            return self.linear(x) * {"half": 0.5, "double": 2.0}[kind]

    module, x = seeded(Shifted), normal(4, 8)
    model = compiled(module)
    with torch.no_grad():
        for kind in ("half", "double", "half"):
            assert error(module(x, kind), model(x, kind)) <= TOLERANCE
        module.linear.weight.mul_(3)
        with torch.inference_mode():
            assert error(module(x, "half"), model(x, "half")) <= TOLERANCE
    assert lowered() == [True] * 3


class Fixed(nn.Module):
    """Refuses every length but one, which is found when the graph is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("bias", torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.bias


def test_sizes_that_the_model_fixes_stay_fixed() -> None:
    module = seeded(Fixed)
    model = compiled(module)
    with torch.no_grad():
        for rows in (2, 3):
            assert error(module(x := normal(rows, 4, 8)), model(x)) <= TOLERANCE
    assert lowered() == [True]


def test_sizes_are_constants_where_the_caller_wants_that() -> None:
    case = feed_forward()
    model = compiled(case.model, dynamic=False)
    with torch.no_grad():
        for rows in (2, 3):
            assert error(case.model(x := normal(rows, 5, 8)), model(x)) <= TOLERANCE
    assert lowered() == [True, True]
