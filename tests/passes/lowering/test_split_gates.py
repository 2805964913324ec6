"""Tests of split-gates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.backends.base import Backend
from lissom.ops import packed_linear, quantized_linear, weight_quantized_linear
from lissom.ops.native import load_kernels, missing_int8_kernel
from lissom.passes.lowering.split_gates import SplitGates
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, every_backend, rewrite
from tests.support.models import normal, seeded

needs_kernels = pytest.mark.skipif(bool(load_kernels()), reason=f"there are no kernels: {load_kernels()}")

Gate = Callable[[torch.Tensor], torch.Tensor]


class Gated(nn.Module):
    """A feed-forward with one layer for gate and up."""

    def __init__(self, gate: Gate, bias: bool = True, width: int = 8) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(width, 6 * width, bias), nn.Linear(3 * width, width), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(self.up(x)))


def first(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.gelu(gate) * up


def second(x: torch.Tensor) -> torch.Tensor:
    up, gate = x.split(x.shape[-1] // 2, -1)
    return up * functional.silu(gate)


def halves(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.tensor_split(2, -1)
    return functional.relu(gate) * up


GATES = {"first": first, "second": second, "tensor_split": halves}


@needs_kernels
def test_rewrites() -> None:
    _, history = rewrite(SplitGates(), seeded(lambda: Gated(first)), normal(2, 5, 8))
    check_golden("split_gates", history.diff(0, 1))


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_numbers(name: str, bias: bool) -> None:
    module = seeded(lambda: Gated(GATES[name], bias))
    program, _ = rewrite(SplitGates(), module, normal(2, 5, 8))
    assert calls(program, aten.linear.default) == 3
    halves = {f"up.{half}.{leaf}" for half in ("gate", "up") for leaf in ("weight", "bias")[: 1 + bias]}
    assert set(program.weights()) == halves | {"down.weight", "down.bias"}
    order = ("up", "gate") if name == "second" else ("gate", "up")
    assert torch.equal(torch.cat([program.weight(f"up.{half}.weight") for half in order]), module.up.weight)
    x = normal(3, 7, 8, seed=1).double()
    wanted = copy.deepcopy(module).double()(x)
    # Sums of up to twenty-four float32 products of order 1.
    torch.testing.assert_close(program(x.float()).double(), wanted, rtol=0, atol=2e-6)


@needs_kernels
def test_the_gate_is_computed_in_the_kernels() -> None:
    compiled = captures.compile(seeded(lambda: Gated(first, width=64)), normal(2, 5, 64))
    assert calls(compiled.program, packed_linear) == 3
    assert calls(compiled.program, aten.gelu.default, aten.mul.Tensor, aten.chunk.default) == 0


@pytest.mark.skipif(missing_int8_kernel(torch.float32, torch.device("cpu")) is not None, reason="no kernel for bytes here")
@pytest.mark.parametrize(
    ("passes", "kernel"), [("quantize", quantized_linear), ("quantize{scheme=int4-weight}", weight_quantized_linear)]
)
def test_quantized_weights_are_split_with_their_grid(passes: str, kernel: torch._ops.OpOverload) -> None:
    module = seeded(lambda: Gated(second, width=64))
    compiled = captures.compile(module, normal(2, 5, 64), passes=passes, goal=None)
    assert calls(compiled.program, kernel) == 2  # the last layer stays as it is
    assert calls(compiled.program, aten.silu.default, aten.mul.Tensor, aten.split.Tensor) == 0


class Shared(nn.Module):
    """Merged layers that stay: another activation, a piece that is read twice, a weight that is, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 16, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, up = self.a(x).chunk(2, -1)
        first = torch.tanh(gate) * up
        gate, up = self.b(x).chunk(2, -1)
        second = functional.gelu(gate) * up + up
        gate, up = self.c(x).chunk(2, -1)
        third = functional.gelu(gate) * up @ self.c.weight[:8]
        gate, up = functional.linear(x, self.d.weight * x.mean()).chunk(2, -1)
        return first, second, third, functional.gelu(gate) * up


def test_leaves_other_layers_alone() -> None:
    program, history = rewrite(SplitGates(), seeded(Shared), normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert [skip.reason for skip in history.steps[1].skipped] == ["its weight is computed, or read elsewhere too"] * 2


@needs_kernels
def test_other_dtypes_stay_with_the_reason() -> None:
    program, history = rewrite(SplitGates(), seeded(lambda: Gated(first)).double(), normal(2, 5, 8).double())
    assert program.text() == history.texts[0]
    assert history.steps[1].skipped[0].reason == "there is no kernel for torch.float64 on this machine"


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(lambda: Gated(first))
    fast = captures.compile(module, normal(2, 5, 8), passes="split-gates", backend=backend)
    x = normal(3, 7, 8, seed=1)
    # Sums of up to twenty-four products, in another order.
    torch.testing.assert_close(fast(x), module(x), rtol=1e-5, atol=1e-6)
