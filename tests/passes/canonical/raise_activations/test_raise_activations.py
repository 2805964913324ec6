from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN, MishActivation
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

from lissom import ops
from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.passes.canonical.raise_activations.raise_activations import RaiseActivations
from tests.support import captures
from tests.support.harness import Calls, TextCase, aten, calls, check_golden, every_backend, rewrite, text_cases
from tests.support.models import normal, seeded

Function = Callable[..., torch.Tensor]

GELU: dict[str, Function] = {
    "gelu_python": ACT2FN["gelu_python"],
    "product with 0.7071": lambda x: 0.5 * x * (1 + torch.erf(x * 0.70710678)),
    "scale last": lambda x: (1 + torch.erf(x / math.sqrt(2))) * x / 2,
}
GELU_TANH: dict[str, Function] = {
    **{name: ACT2FN[name] for name in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")},
    "bloom": bloom_gelu_forward,
    "cube as products": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
}
SILU: dict[str, Function] = {
    "x sigmoid": lambda x: x * torch.sigmoid(x),
    "sigmoid x": lambda x: torch.sigmoid(x) * x,
    "division": lambda x: x / (1 + torch.exp(-x)),
    "reciprocal": lambda x: x * (1 + (-x).exp()).reciprocal(),
}
MISH: dict[str, Function] = {
    "transformers": MishActivation()._mish_python,
    "log1p": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}
SQUARED_RELU: dict[str, Function] = {
    "relu2": ACT2FN["relu2"],
    "power": lambda x: torch.relu(x) ** 2,
    "product": lambda x: torch.relu(x) * torch.relu(x),
    "half of it": lambda x: x * torch.relu(x),
    "clamp": lambda x: x.clamp(min=0).square(),
    "clamp_min": lambda x: x.clamp_min(0.0).square(),
}


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def mish(x: float) -> float:
    return x * math.tanh(math.log1p(math.exp(x)))


def squared_relu(x: float) -> float:
    return x * x if x > 0 else 0.0


Oracle = Callable[[float], float]
SPELLINGS: list[tuple[str, Function, torch._ops.OpOverload, Oracle]] = [
    *((f"gelu, {name}", function, aten.gelu.default, gelu) for name, function in GELU.items()),
    *((f"gelu tanh, {name}", function, aten.gelu.default, gelu_tanh) for name, function in GELU_TANH.items()),
    *((f"silu, {name}", function, aten.silu.default, silu) for name, function in SILU.items()),
    *((f"mish, {name}", function, aten.mish.default, mish) for name, function in MISH.items()),
    *((f"squared relu, {name}", function, ops.squared_relu, squared_relu) for name, function in SQUARED_RELU.items()),
]
every_spelling = pytest.mark.parametrize(
    "function, target, oracle", [item[1:] for item in SPELLINGS], ids=[item[0] for item in SPELLINGS]
)


class Mlp(nn.Module):
    """A gate with SiLU and a layer with GELU, both written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x)
        return ACT2FN["gelu_new"](self.down(gate * torch.sigmoid(gate) * self.up(x)))


def approximation(program: Program) -> object:
    return program.nodes(aten.gelu.default)[0].kwargs.get("approximate", "none")


def elementwise(oracle: Oracle, x: torch.Tensor) -> torch.Tensor:
    """The oracle of each number, one after the other, in float64."""
    return torch.tensor([oracle(number) for number in x.double().flatten().tolist()], dtype=torch.float64).reshape(x.shape)


def test_rewrites() -> None:
    _, history = rewrite(RaiseActivations(), seeded(Mlp), normal(2, 5, 4))
    check_golden("raise_activations", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    module = nn.Sequential(nn.GELU(), nn.SiLU(), nn.Mish(), nn.GELU("tanh"), nn.ReLU())
    program, history = rewrite(RaiseActivations(), module, normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


@every_spelling
def test_numbers(function: Function, target: torch._ops.OpOverload, oracle: Oracle) -> None:
    program, _ = rewrite(RaiseActivations(), Calls(function), normal(2, 5, 8))
    assert [node.target for node in program.nodes()] == [target]
    x = 3 * normal(3, 7, 8, seed=1)
    # A dozen roundings to 6e-8 relative on values below 12.
    torch.testing.assert_close(program(x).double(), elementwise(oracle, x), rtol=1e-6, atol=1e-6)


@every_spelling
def test_numbers_in_bfloat16(function: Function, target: torch._ops.OpOverload, oracle: Oracle) -> None:
    program, _ = rewrite(RaiseActivations(), Calls(function), normal(2, 5, 8).bfloat16())
    assert [node.target for node in program.nodes()] == [target]
    x = normal(3, 7, 8, seed=1).bfloat16()
    # The operator rounds once, to 8 bits: 2^-8 = 3.9e-3 relative.
    torch.testing.assert_close(program(x).double(), elementwise(oracle, x), rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("function", GELU.values(), ids=GELU)
def test_the_exact_gelu_is_told_from_the_approximate(function: Function) -> None:
    program, _ = rewrite(RaiseActivations(), Calls(function), normal(2, 5, 8))
    assert approximation(program) == "none"


@pytest.mark.parametrize("function", GELU_TANH.values(), ids=GELU_TANH)
def test_the_approximate_gelu_is_told_from_the_exact(function: Function) -> None:
    program, _ = rewrite(RaiseActivations(), Calls(function), normal(2, 5, 8))
    assert approximation(program) == "tanh"


def test_a_pooler_keeps_its_tanh() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    program, _ = rewrite(RaiseActivations(), module, normal(2, 5, 8))
    assert calls(program, aten.tanh.default) == 1


@text_cases("raise_activations")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(Mlp)
    fast = captures.compile(module, normal(2, 5, 4), backend=backend)
    assert calls(fast.program, aten.tanh.default, aten.sigmoid.default) == 0
    x = normal(3, 7, 4, seed=1)
    # A dozen roundings to 6e-8 relative on values of order 1.
    torch.testing.assert_close(fast(x), module(x), rtol=1e-6, atol=1e-6)
