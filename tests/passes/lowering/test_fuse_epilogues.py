"""Tests of fuse-epilogues."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.compiler.ir.program import Program
from lissom.ops import packed_linear, packed_linear_norm
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, rewrite
from tests.support.models import normal, seeded, tiny_llama

PASSES = "pack-linear,fuse-epilogues"


class Block(nn.Module):
    """What a function makes of one layer, a second value, and a norm.

    function: called with the module and its input.
    """

    def __init__(self, function: Callable[[Block, torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.layer, self.other, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self, x)


def fused(function: Callable[[Block, torch.Tensor], object]) -> tuple[Program, Block]:
    module = seeded(lambda: Block(function))
    program, _ = rewrite(PASSES, module, normal(2, 5, 8))
    return program, module


FUSED = {
    "relu": (lambda m, x: functional.relu(m.layer(x)), packed_linear),
    "gelu": (lambda m, x: functional.gelu(m.layer(x)), packed_linear),
    "tanh gelu": (lambda m, x: functional.gelu(m.layer(x), approximate="tanh"), packed_linear),
    "silu": (lambda m, x: functional.silu(m.layer(x)), packed_linear),
    "add": (lambda m, x: m.layer(x) + x, packed_linear),
    "add from the left": (lambda m, x: x + m.layer(x), packed_linear),
    "gate": (lambda m, x: functional.silu(m.layer(x)) * x, packed_linear),
    "activation, then add": (lambda m, x: functional.gelu(m.layer(x)) + x, packed_linear),
    "norm": (lambda m, x: m.norm(m.layer(x)), packed_linear_norm),
    "add, then norm": (lambda m, x: m.norm(m.layer(x) + x), packed_linear_norm),
    "norm without weights": (lambda m, x: functional.layer_norm(m.layer(x) + x, (8,)), packed_linear_norm),
}


@pytest.mark.parametrize("name", FUSED)
def test_one_call_remains_and_gives_the_same(name: str) -> None:
    function, target = FUSED[name]
    program, module = fused(function)
    assert [node.target for node in program.nodes()] == [target]
    x = normal(3, 7, 8, seed=1)
    # Eight products, an activation good to 2e-7, and a norm of eight values.
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=2e-6)


LEFT = {
    "the product is read twice": lambda m, x: (functional.relu(m.layer(x)), m.layer(x)),
    "the sum is read twice": lambda m, x: ((h := m.layer(x) + x), m.norm(h)),
    "the other value is broadcast": lambda m, x: m.layer(x) + x[:1],
    "the sum is scaled": lambda m, x: torch.add(m.layer(x), x, alpha=0.5),
    "a norm over more than the features": lambda m, x: functional.layer_norm(m.layer(x), x.shape[1:]),
    "an activation behind the sum": lambda m, x: functional.relu(m.layer(x) + x),
}


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_stay_right(name: str) -> None:
    program, module = fused(LEFT[name])
    assert len(program.nodes()) > 1
    x = normal(2, 5, 8, seed=1)
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=2e-6)


def test_rewrites() -> None:
    module = seeded(lambda: Block(lambda m, x: m.norm(m.layer(functional.gelu(m.other(x))) + x)))
    _, history = rewrite(PASSES, module, normal(2, 5, 8))
    check_golden("fuse_epilogues", history.diff(1, 2))


def test_two_products_are_summed_in_one_of_them() -> None:
    program, _ = fused(lambda m, x: m.layer(x) + m.other(x))
    assert calls(program, packed_linear) == 2
    assert calls(program, aten.add.Tensor) == 0


def test_a_gated_feed_forward_is_three_calls() -> None:
    case = tiny_llama()
    program = captures.compile(case.model, case.inputs).program
    layers = case.model.config.num_hidden_layers
    gates = [node for node in program.nodes(packed_linear) if node.kwargs.get("combine") == "mul"]
    assert len(gates) == layers
    assert calls(program, aten.silu.default, aten.mul.Tensor) == calls(program, aten.mul.Tensor)
