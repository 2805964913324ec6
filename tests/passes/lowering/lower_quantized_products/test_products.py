"""Tests of lower-quantized-products with Triton's kernels, by their references on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.backends.simulated_layers import count_kernels, simulated_layers
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.verify.rounding import differs_locally
from lissom.ops import int4_product, int8_product, quantize_rows
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic
from tests.support import captures
from tests.support.harness import aten, calls, rewrite
from tests.support.models import normal, seeded, tiny_gpt2, tiny_llama

FOLD, LOWER, FUSE = ",fold-quantized-weights", ",lower-quantized-products{always=true,triton=true}", ",fuse-epilogues"
BF16 = "cast{dtype=bf16},"
HALF = "half"
"""The module and its inputs in float16; the pass `cast` would need data."""


class Block(nn.Module):
    """Odd sizes: two layers that read a norm, an activation, a gate, and a residual add."""

    def __init__(self, width: int = 10, hidden: int = 14) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Turned(nn.Module):
    """A weight kept as [features in, features out], with a bias per row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(12, 6)), nn.Parameter(normal(9, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def lowered(
    module: nn.Module, x: torch.Tensor, *, options: str = "", cast: str = "", fuse: str = ""
) -> tuple[Program, Program, History]:
    """The quantized program, and the lowered one."""
    if cast == HALF:
        module, x, cast = module.half(), x.half(), ""
    passes = f"{cast}quantize{{lm_head=true{options}}}"
    before, _ = rewrite(passes, module, x)
    return before, *rewrite(passes + FOLD + LOWER + fuse, module, x)


def given(x: torch.Tensor, cast: str) -> torch.Tensor:
    return x.half() if cast == HALF else x


def close(left: object, right: object, allowed: float) -> None:
    assert isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    left, right = left.detach().double(), right.detach().double()
    assert float((left - right).norm()) <= allowed * float(right.norm())


def test_rewrites() -> None:
    _, program, history = lowered(seeded(Block), normal(2, 5, 10), fuse=FUSE)
    found = [str(node.target) for node in program.nodes() if isinstance(node.target, torch._ops.OpOverload)]
    layer = ["lissom.quantize_rows.default", "lissom.int8_product.default"]
    assert found == ["aten.layer_norm.default", *layer, layer[1], *layer]
    assert [step.summary for step in history.steps[-2:]] == ["rewrote 3", "rewrote 3"]
    assert "activation='silu', combine='mul')  # gate" in program.text()


@pytest.mark.parametrize("cast", ["", BF16, HALF])
@pytest.mark.parametrize("options", ["", ",granularity=tensor", ",activations=tensor"])
def test_int8_numbers(options: str, cast: str) -> None:
    before, program, _ = lowered(seeded(Block), normal(2, 5, 10), options=options, cast=cast)
    assert calls(program, int8_product) == count_kernels(program) == 3
    assert calls(program, quantize_rows) == (0 if "activations" in options else 2)  # up and gate read the same values
    assert calls(program, fake_quantize_dynamic, dequantize, aten.linear.default, aten.reshape.default) == 0
    assert not simulated_layers(program)
    samples = [[given(normal(*shape, 10, seed=1), cast)] for shape in ((1, 1), (3, 7), (4, 33))]
    assert not differs_locally(before, program, samples)
    for sample in [] if cast else samples:
        # A value half way between two steps may round the other way after the first layers, by 1/255 of its range.
        close(program.run(sample)[0], before.run(sample)[0], 2e-3)


def test_a_dynamic_layer_is_two_kernels() -> None:
    _, program, _ = lowered(seeded(lambda: nn.Linear(7, 5)), normal(2, 3, 7))
    assert [node.target for node in program.nodes() if "getitem" not in node.name] == [quantize_rows, int8_product]


def test_static_scales_are_weights() -> None:
    module, x, data = seeded(Block), normal(2, 5, 10), [normal(2, 5, 10, seed=seed) for seed in range(4)]
    passes = "quantize{scheme=int8-static,lm_head=true}"
    before = captures.optimize(module, x, passes=passes, data=data).program
    program = captures.optimize(module, x, passes=passes + FOLD + LOWER + FUSE, data=data).program
    assert (calls(program, int8_product), calls(program, fake_quantize, aten.aminmax.default, quantize_rows)) == (3, 0)
    found = normal(3, 7, 10, seed=9)
    close(program(found), before(found), 2e-3)  # as above


@pytest.mark.parametrize("cast", [BF16, HALF])
@pytest.mark.parametrize(
    "options",
    ["group=2,symmetric=true", "group=2,symmetric=false", "granularity=channel,symmetric=true", "granularity=tensor"],
)
def test_int4_numbers(options: str, cast: str) -> None:
    before, program, history = lowered(
        seeded(Block), normal(2, 5, 10), options=f",scheme=int4-weight,{options}", cast=cast, fuse=FUSE
    )
    assert calls(program, int4_product) == count_kernels(program) == 3, history.steps[-2].skipped
    assert calls(program, aten.linear.default, dequantize) == 0
    x = given(normal(3, 7, 10, seed=1), cast)
    # The kernel rounds once where the simulation rounds product, activation, gate and sum: 4 · 2^-9 in bfloat16.
    close(program(x), before(x), 8e-3)


def test_a_weight_of_four_bits_is_stored_once() -> None:
    _, program, _ = lowered(seeded(lambda: nn.Linear(8, 6)), normal(2, 8), options=",scheme=int4-weight,group=4", cast=BF16)
    stored = [name for name, tensor in program.weights().items() if tensor.dtype == torch.uint8 and tensor.shape == (6, 4)]
    assert len(stored) == 1


@pytest.mark.parametrize(("scheme", "cast", "allowed"), [("int8-dynamic", "", 1e-6), ("int4-weight,group=4", BF16, 8e-3)])
def test_turned_weights_and_a_bias_per_row(scheme: str, cast: str, allowed: float) -> None:
    before, program, _ = lowered(seeded(Turned), normal(9, 12), options=f",scheme={scheme}", cast=cast)
    assert calls(program, int8_product, int4_product) == 1
    x = normal(9, 12, seed=1)
    # Exact sums and scales of float32; two roundings to bfloat16, of the product and with the bias.
    close(program(x), before(x), allowed)


def test_epilogues_are_fused() -> None:
    _, program, _ = lowered(seeded(Block), normal(2, 5, 10), fuse=FUSE)
    products = program.nodes(int8_product)
    assert [(node.kwargs.get("activation"), node.kwargs.get("combine")) for node in products] == [
        (None, None),
        ("silu", "mul"),
        (None, "add"),
    ]
    assert calls(program, aten.add.Tensor, aten.mul.Tensor, aten.silu.default) == 0


LEFT = {
    ",scheme=int4-weight,group=2": "int4 is multiplied with bfloat16 or float16, and this layer reads float32: "
    "put cast{dtype=bf16} before",
    ",symmetric=false": "its weight is in uint8, and PyTorch multiplies quantized values with int8 or fp8",
    ",scheme=fp8": "its sizes, 14 and 10, are not both multiples of 16",
}


@pytest.mark.parametrize("options", LEFT)
def test_what_has_no_product_is_left_with_the_reason(options: str) -> None:
    *_, program, history = lowered(seeded(Block), normal(2, 5, 10), options=options)
    assert calls(program, aten.linear.default) == 3
    assert history.steps[-1].skipped[0].reason == LEFT[options]


@pytest.mark.parametrize(("make", "layers"), [(tiny_gpt2, 8), (tiny_llama, 14)])
@pytest.mark.parametrize("passes", ["quantize", f"{BF16}quantize{{scheme=int4-weight,group=4}}"])
def test_composes(make, layers: int, passes: str) -> None:
    case = make()
    found = captures.optimize(case.model, case.inputs, passes=passes + FOLD + LOWER + FUSE)
    assert calls(found.program, int8_product, int4_product) == layers
    assert not simulated_layers(found.program)
