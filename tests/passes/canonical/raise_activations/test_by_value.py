"""Tests of lissom.passes.canonical.raise_activations.by_value."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.frontends.capture.export import capture
from lissom.passes.canonical.raise_activations.by_value import find_function, grid
from tests.support.models import normal

aten = torch.ops.aten


class Function(nn.Module):
    """Applies a function of one tensor between two linear layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.function(self.up(x)))


def spelled(function: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    return capture(Function(function).eval(), (normal(2, 4),)).program


def found_in(
    program: Program, core: object, reference: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[fx.Node, fx.Node] | None:
    return find_function(program.nodes(core)[0], reference)


def is_whole(program: Program, found: tuple[fx.Node, fx.Node] | None) -> bool:
    """True when the expression found is all there is between the two linear layers."""
    up, down = program.nodes(aten.linear.default)
    return found == (down.args[0], up)


GELUS = {
    "halved last": lambda x: x * (1.0 + torch.erf(x / math.sqrt(2.0))) * 0.5,
    "halved first": lambda x: 0.5 * x * (1.0 + torch.erf(x * 0.70710678)),
    "halved inside": lambda x: x * (0.5 + 0.5 * torch.erf(x / 1.41421356)),
    "in float64": lambda x: (x.double() * 0.5 * (1 + torch.erf(x.double() / math.sqrt(2.0)))).float(),
}


@pytest.mark.parametrize("spelling", GELUS)
def test_every_spelling_of_gelu_is_found(spelling):
    program = spelled(GELUS[spelling])
    assert is_whole(program, found_in(program, aten.erf.default, functional.gelu))


def test_a_rounded_constant_is_the_same_function():
    program = spelled(lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x * x * x))))
    found = found_in(program, aten.tanh.default, lambda x: functional.gelu(x, approximate="tanh"))
    assert is_whole(program, found)


def test_silu_is_found_from_sigmoid_and_exponential():
    program = spelled(lambda x: x * torch.sigmoid(x))
    assert is_whole(program, found_in(program, aten.sigmoid.default, functional.silu))
    program = spelled(lambda x: x / (1 + torch.exp(-x)))
    assert is_whole(program, found_in(program, aten.exp.default, functional.silu))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 0.5 * x * (1.0 + torch.erf(x / 1.5)),
        lambda x: 0.51 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: torch.erf(x / math.sqrt(2.0)),
    ],
    ids=["another divisor", "another factor", "a part of it"],
)
def test_another_function_is_not_found(function):
    assert found_in(spelled(function), aten.erf.default, functional.gelu) is None


@pytest.mark.parametrize("limit", [100.0, 1e5])
def test_a_clamp_far_out_is_another_function(limit):
    program = spelled(lambda x: (x * torch.sigmoid(x)).clamp(max=limit))
    root, _ = found_in(program, aten.sigmoid.default, functional.silu)
    assert nodes.is_call(root, aten.mul.Tensor)


def test_an_expression_of_two_values_is_not_found():
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y * torch.sigmoid(x)

    program = capture(Gated(), (normal(2, 4), normal(2, 4))).program
    assert found_in(program, aten.sigmoid.default, functional.silu) is None


def test_a_gate_beside_the_function_is_left_outside():
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x * torch.sigmoid(x)) * y

    program = capture(Gated(), (normal(2, 4), normal(2, 4))).program
    root, argument = found_in(program, aten.sigmoid.default, functional.silu)
    assert root is program.nodes(aten.mul.Tensor)[0]
    assert argument is program.placeholders[0]


def test_cast_to_integers_is_no_part_of_function():
    program = spelled(lambda x: x * torch.sigmoid(x.to(torch.int32).to(torch.float32)))
    assert found_in(program, aten.sigmoid.default, functional.silu) is None


def test_the_grid_holds_zero_and_both_tails():
    points = grid()
    # The middle point is a sum of 90 steps of 0.1, each exact to 1e-17.
    assert points.abs().min() < 1e-14
    torch.testing.assert_close(points.sort().values, -points.sort().values.flip(0))
    assert points.max() > 1e5
