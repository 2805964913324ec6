"""Tests of lower-quantized-products on a CPU, which has all of its products but that with four bits; a stand-in has that one.

tests/backends/eager/test_cuda.py has what needs a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lissom.backends.eager.backend import Eager
from lissom.backends.inductor import Inductor
from lissom.backends.simulated_layers import count_kernels, simulated_layers
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.verify.divergence import compare, run_samples
from lissom.compiler.verify.rounding import differs_locally
from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dynamic_scale, fake_quantize, fake_quantize_dynamic
from lissom.passes.lowering.lower_quantized_products import lower_quantized_products
from lissom.passes.lowering.lower_quantized_products.lower_quantized_products import LowerQuantizedProducts
from lissom.passes.lowering.lower_quantized_products.stored_weights import per_feature, tile_grid
from tests.support import captures
from tests.support.harness import aten, calls, capture_model, check_golden, rewrite
from tests.support.models import normal, seeded, tiny_gpt2

LOWERING = ",fold-quantized-weights,lower-quantized-products"
BYTES, FP8, FOUR, EIGHT = (
    aten._int_mm.default,
    aten._scaled_mm.default,
    aten._weight_int4pack_mm.default,
    aten._weight_int8pack_mm.default,
)


class Two(nn.Module):
    """A layer with a bias and one without, after a norm that two layers read."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.down(torch.tanh(self.up(x)) * self.gate(x))


class Turned(nn.Module):
    """Weights kept as [features in, features out]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bias = (nn.Parameter(normal(*sizes)) for sizes in ((32, 64), (64, 16), (16,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.mm(x, self.first), self.second)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is one of compute capability 9.0, on which nothing is measured."""
    of_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(lower_quantized_products, "_slower", lambda edit, layer: None)


def of_capability(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int]) -> None:
    monkeypatch.setattr(lower_quantized_products, "capability", lambda device: found)


@pytest.fixture
def four_bits() -> Iterator[None]:
    """The operators of four bits as int4mm.cu has them, but for where in memory the tiles lie."""
    library = torch.library.Library("aten", "IMPL")

    def convert(weight: torch.Tensor, together: int) -> torch.Tensor:
        features, half = weight.shape
        assert features % 8 == 0 and 2 * half % (16 * together) == 0
        return weight.view(torch.int32).reshape(features // 8, 2 * half // (16 * together), 32, together // 2)

    def multiply(x: torch.Tensor, weight: torch.Tensor, group: int, grid: torch.Tensor) -> torch.Tensor:
        assert x.dtype == grid.dtype == torch.bfloat16 and x.is_contiguous() and group in (32, 64, 128, 256)
        both = weight.contiguous().view(torch.uint8).reshape(8 * weight.shape[0], -1)
        q = torch.stack((both >> 4, both & 15), -1).flatten(1).bfloat16() - 8
        scale, offset = (part.repeat_interleave(group, 0).T for part in grid.unbind(-1))
        return x @ torch.addcmul(offset, q, scale).T

    library.impl("_convert_weight_to_int4pack", convert, "CPU")
    library.impl("_weight_int4pack_mm", multiply, "CPU")
    yield
    library._destroy()


def rounded(module: nn.Module, *args: torch.Tensor, options: str = "", cast: str = "") -> Program:
    """The module with Q/DQ; its last layer is an LM head, as far as can be seen."""
    return rewrite(f"{cast}quantize{{lm_head=true{options}}}", module, *args)[0]


def lowered(module: nn.Module, *args: torch.Tensor, options: str = "", cast: str = "") -> tuple[Program, History]:
    return rewrite(f"{cast}quantize{{lm_head=true{options}}}{LOWERING}", module, *args)


def reasons(history: History) -> list[str]:
    return [skip.reason for skip in history.steps[-1].skipped]


def close(left: object, right: object, allowed: float) -> None:
    assert isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    left, right = left.detach(), right.detach()
    assert left.shape == right.shape and left.dtype == right.dtype
    assert float((left.double() - right.double()).norm()) <= allowed * float(right.double().norm())


@pytest.mark.usefixtures("newest")
def test_rewrites() -> None:
    _, history = lowered(seeded(Two), normal(2, 5, 64))
    check_golden("lower_quantized_products", history.diff(2, 3))


@pytest.mark.usefixtures("newest")
def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite("lower-quantized-products", seeded(Two), normal(2, 5, 64))
    assert (history.texts[0], history.steps[-1].summary) == (history.texts[1], "nothing to do")


def values_multiplied(program: Program, target: object, x: torch.Tensor) -> list[torch.Tensor]:
    """The first factor of every product while the program runs."""
    found: dict[str, object] = {}
    with torch.no_grad():
        program.run([x], lambda node, value: found.update({node.name: value}))
    return [found[node.args[0].name] for node in program.nodes(target)]  # pyright: ignore


SHAPES = st.lists(st.sampled_from([1, 2, 3, 5, 16, 17, 33]), min_size=0, max_size=3)
SIZES = st.sampled_from([8, 16, 24, 56])


@settings(max_examples=12)
@given(
    shape=SHAPES, inputs=SIZES, features=SIZES, bias=st.booleans(), by=st.sampled_from(["token", "tensor"]),
    size=st.sampled_from([1e-3, 1.0, 300.0]), shift=st.sampled_from([-2.0, 0.0, 9.0]), dynamic=st.booleans(),
)  # fmt: skip
def test_sums_of_bytes_are_exact(
    shape: list[int], inputs: int, features: int, bias: bool, by: str, size: float, shift: float, dynamic: bool
) -> None:
    module = seeded(lambda: nn.Linear(inputs, features, bias))
    x = size * (normal(*shape, inputs, seed=len(shape)) + shift)
    quantize = f"quantize{{lm_head=true,activations={by}}},fold-quantized-weights,lower-quantized-products{{always=true}}"
    program, history = rewrite(quantize, module, x, dynamic=dynamic and len(shape) > 0)
    assert history.steps[-1].summary == "rewrote 1"
    flat = x.reshape(-1, inputs)
    scale, zero_point = dynamic_scale(flat, "uint8", by)
    q = formats.quantize(flat, scale, zero_point, FORMATS["uint8"])
    (multiplied,) = values_multiplied(program, BYTES, x)
    assert len(multiplied) == len(flat) if len(flat) >= 32 and not dynamic else len(multiplied) >= 32
    assert torch.equal(multiplied[: len(flat)].int() + 128, q.int())
    weight = module.weight.detach()
    step = weight.abs().amax(1) / 127
    whole = (q.double() - zero_point.double()) @ (weight / step[:, None]).round().double().T
    wanted = whole * scale.double() * step.double() + (module.bias.detach().double() if bias else 0)
    # An exact sum scaled in float32, unit roundoff 6e-8.
    close(program(x), wanted.float().reshape(*shape, features), 1e-6)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize("options", ["", ",activations=tensor", ",granularity=tensor"])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8"])
@pytest.mark.parametrize("cast", ["", "cast{dtype=bf16},"])
def test_numbers(scheme: str, options: str, cast: str) -> None:
    module, options = seeded(Two), f",scheme={scheme}{options}"
    before = rounded(module, normal(2, 5, 64), options=options, cast=cast)
    program, _ = lowered(module, normal(2, 5, 64), options=options, cast=cast)
    assert calls(program, BYTES, FP8) == count_kernels(program) == 3
    assert calls(program, fake_quantize_dynamic, aten.linear.default) == 0
    assert not simulated_layers(program)
    samples = [[normal(*shape, 64, seed=1)] for shape in ((1, 1), (3, 7), (4, 33))]
    assert not differs_locally(before, program, samples)
    if not cast:
        for sample in samples:
            # Behind the first layers a value half way between two steps may go the other way: few of 128 do, by a step of fp8,
            # 1/16 of a value, or of uint8, 1/255 of the range.
            close(program.run(sample)[0], before.run(sample)[0], 2e-3)


@pytest.mark.usefixtures("newest")
def test_values_are_rounded_once_for_all_that_read_them() -> None:
    program, _ = lowered(seeded(Two), normal(2, 5, 64))
    assert (calls(program, BYTES), calls(program, aten.aminmax.default)) == (3, 2)


def test_a_known_scale_becomes_weights(newest: None) -> None:
    module, x = seeded(Two), normal(2, 5, 64)
    data = [normal(2, 5, 64, seed=seed) for seed in range(4)]
    passes = "quantize{scheme=int8-static,lm_head=true}"
    before = captures.optimize(module, x, passes=passes, data=data).program
    program = captures.optimize(module, x, passes=passes + LOWERING, data=data).program
    assert (calls(program, BYTES), calls(program, fake_quantize, aten.aminmax.default)) == (3, 0)
    found = normal(3, 7, 64, seed=9)
    close(program(found), before(found), 2e-3)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(("scheme", "target"), [("int8-dynamic", BYTES), ("fp8", FP8), ("int8-weight", EIGHT)])
def test_weights_kept_the_other_way_round_are_turned(scheme: str, target: object) -> None:
    before = rounded(seeded(Turned), normal(9, 32), options=f",scheme={scheme}")
    program, _ = lowered(seeded(Turned), normal(9, 32), options=f",scheme={scheme}")
    assert calls(program, target) == 2
    close(program(normal(9, 32)), before(normal(9, 32)), 2e-3)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("cast", ["", "cast{dtype=bf16},"])
def test_weights_of_eight_bits(granularity: str, cast: str) -> None:
    options = f",scheme=int8-weight,granularity={granularity}"
    before = rounded(seeded(Two), normal(2, 5, 64), options=options, cast=cast)
    program, _ = lowered(seeded(Two), normal(2, 5, 64), options=options, cast=cast)
    assert calls(program, EIGHT) == count_kernels(program) == 3
    x = normal(3, 7, 64, seed=1)
    # Sums of 128 floats in another order; in bfloat16 scales are rounded by up to 4e-3, weights no more.
    close(program(x), before(x), 1e-2 if cast else 1e-6)


@pytest.mark.usefixtures("newest", "four_bits")
@pytest.mark.parametrize("make", [lambda: Two(128), lambda: Turned()], ids=["linear", "turned"])
@pytest.mark.parametrize(
    "options",
    ["group=32,symmetric=true", "group=16,symmetric=false", "group=64,symmetric=true", "granularity=channel,symmetric=false"],
)
def test_weights_of_four_bits(options: str, make: type[nn.Module]) -> None:
    module = seeded(make)
    x = normal(9, 32) if isinstance(module, Turned) else normal(2, 5, 128)
    options = f",scheme=int4-weight,{options}"
    program, history = lowered(module, x, options=options, cast="cast{dtype=bf16},")
    if "group=16" in options:
        assert set(reasons(history)) == {"16 inputs share a scale, and PyTorch takes multiples of 32"}
        return
    before = rounded(module, x, options=options, cast="cast{dtype=bf16},")
    if reasons(history):  # a layer of 32 inputs has no groups of 64
        assert "group=64" in options
    assert calls(program, FOUR) > 0
    # Scales are rounded to bfloat16, by up to 4e-3, and sums twice.
    close(program(x), before(x), 2e-2)


def test_the_grid_of_four_bits_gives_the_weight() -> None:
    q, scale = torch.randint(0, 16, (8, 64), dtype=torch.uint8), torch.rand(8, 1) + 0.5
    zero_point = torch.randint(0, 16, (8, 1), dtype=torch.uint8)
    step, offset = tile_grid(scale, zero_point, 8, 2).float().unbind(-1)
    assert step.shape == (2, 8)
    found = (q.float() - 8) * step.repeat_interleave(32, 0).T + offset.repeat_interleave(32, 0).T
    # Both are rounded to 8 bits: 2e-3 each, and the sums of what is up to 8 steps may cancel.
    torch.testing.assert_close(found, (q.float() - zero_point) * scale, rtol=0, atol=16 * 1.5 * 4e-3)
    # A zero point in floating point is subtracted after scaling.
    step, offset = tile_grid(scale, zero_point * scale, 8, 2).float().unbind(-1)
    found = (q.float() - 8) * step.repeat_interleave(32, 0).T + offset.repeat_interleave(32, 0).T
    torch.testing.assert_close(found, (q.float() - zero_point) * scale, rtol=0, atol=16 * 1.5 * 4e-3)


@pytest.mark.parametrize("shape", [(), (1, 1), (6, 1)])
def test_scales_are_one_a_feature(shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape).half()
    assert torch.equal(per_feature(scale, 6), scale.float().flatten() * torch.ones(6))


GROUPS = "its weight has group-wise scales, and the product takes one scale per feature"
LEFT = {
    ",symmetric=false": "its weight is in uint8, and PyTorch multiplies quantized values with int8 or fp8",
    ",granularity=group,group=2": GROUPS,
    ",scheme=int8-weight,symmetric=false": "its weight is in uint8, and PyTorch multiplies floats with int8, int4 or uint4",
    ",scheme=int8-weight,granularity=group,group=2": GROUPS,
    ",scheme=int4-weight": "int4 is multiplied with bfloat16, and this layer reads float32: put cast{dtype=bf16} before",
}


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize("options", LEFT)
def test_what_has_no_product_is_left_with_the_reason(options: str) -> None:
    program, history = lowered(seeded(Two), normal(2, 5, 64), options=options)
    assert (calls(program, aten.linear.default), reasons(history)) == (3, [LEFT[options]] * 3)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(("scheme", "inputs", "multiple"), [("int8-dynamic", 12, 8), ("int8-dynamic", 20, 8), ("fp8", 24, 16)])
def test_sizes_must_be_multiples(scheme: str, inputs: int, multiple: int) -> None:
    _, history = lowered(seeded(lambda: nn.Linear(inputs, 32)), normal(2, 5, inputs), options=f",scheme={scheme}")
    assert reasons(history) == [f"its sizes, 32 and {inputs}, are not both multiples of {multiple}"]


def test_sums_stay_in_32_bits(newest: None) -> None:
    _, history = lowered(seeded(lambda: nn.Linear(65544, 8)), normal(2, 65544))
    assert reasons(history) == ["it has 65544 inputs, and 32-bit sums take at most 65536"]


def test_a_largest_sum_is_right(newest: None) -> None:
    module = nn.Linear(65536, 8, bias=False)
    module.weight.data.fill_(-1.0)
    program, _ = lowered(module, torch.ones(2, 65536))
    assert calls(program, BYTES) == 1
    # 65,536 products of 255 and -127: the number is exact but for its scales, of float32.
    torch.testing.assert_close(program(torch.ones(2, 65536)), torch.full((2, 8), -65536.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scheme", "found", "needed"), [("int8-dynamic", (7, 5), "int8 8.0"), ("fp8", (8, 6), "fp8 8.9")])
def test_older_devices_are_told(monkeypatch: pytest.MonkeyPatch, scheme: str, found: tuple[int, int], needed: str) -> None:
    of_capability(monkeypatch, found)
    _, history = lowered(seeded(Two), normal(2, 5, 64), options=f",scheme={scheme}")
    told = "products of {} need compute capability {}".format(*needed.split())
    assert reasons(history) == [f"{told}, and this device has {found[0]}.{found[1]}"] * 3


@pytest.mark.parametrize(("found", "within"), [((8, 9), 0), ((9, 0), 3)])
def test_rows_are_scaled_within_where_they_can(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], within: int) -> None:
    of_capability(monkeypatch, found)
    program, _ = lowered(seeded(Two), normal(2, 5, 64), options=",scheme=fp8", cast="cast{dtype=bf16},")
    assert sum(node.args[-1] is torch.bfloat16 for node in program.nodes(FP8)) == within


def test_on_a_cpu_it_does_nothing_and_says_so() -> None:
    _, history = lowered(seeded(Two), normal(2, 5, 64))
    assert reasons(history) == ["it runs on cpu"] * 3
    options = "{lm_head=true,scheme=int4-weight}"
    passes = f"cast{{dtype=bf16}},quantize{options}{LOWERING}{{always=true}}"
    _, history = rewrite(passes, seeded(Two), normal(2, 5, 64))
    assert reasons(history) == ["weight-only products have kernels on CUDA devices only"] * 3


@pytest.mark.parametrize(("seconds", "count"), [((1e-3, 2e-3), 3), ((2e-3, 2e-3), 0)])
def test_weights_of_eight_bits_are_measured(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], count: int) -> None:
    of_capability(monkeypatch, (9, 0))
    results: list[torch.Tensor] = []

    def median(call: Callable[[], torch.Tensor]) -> float:
        results.append(call())
        return seconds[len(results) % 2 - 1]

    monkeypatch.setattr(lower_quantized_products, "median_seconds", median)
    program, history = lowered(seeded(Two), normal(2, 5, 64), options=",scheme=int8-weight")
    assert (calls(program, EIGHT), len(results)) == (count, 6)
    for eight, dense in zip(results[::2], results[1::2], strict=True):
        # The same product in another order.
        torch.testing.assert_close(eight, dense, rtol=1e-4, atol=1e-5)
    told = "with int8 weights it takes 2 ms, in floating point 2 ms; scheme=int8-dynamic quantizes its input too"
    assert reasons(history) == [told] * (3 - count)


def test_backends_bring_it() -> None:
    """On CUDA both, on a CPU TorchInductor alone."""
    eager, inductor = (
        {kind: backend.lowering(torch.device(kind)) for kind in ("cuda", "cpu")} for backend in (Eager(), Inductor())
    )
    for passes in (eager["cuda"], inductor["cuda"]):
        assert "fold-quantized-weights,lower-quantized-products" in ",".join(item.name() for item in passes)
    assert "lower-quantized-products" not in [item.name() for item in eager["cpu"]]
    assert LowerQuantizedProducts(cpu=True) in inductor["cpu"]
    assert LowerQuantizedProducts() in inductor["cuda"]


@pytest.mark.usefixtures("newest")
def test_composes() -> None:
    case = tiny_gpt2()
    found = captures.optimize(case.model, case.inputs, passes=f"cast{{dtype=bf16}},quantize{LOWERING},fold-casts")
    assert calls(found.program, BYTES) == 8
    assert not simulated_layers(found.program)


@pytest.mark.slow
@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize("options", ["", ",activations=tensor", ",scheme=fp8"])
def test_inductor_compiles_it(options: str) -> None:
    captured = capture_model(seeded(Two), normal(2, 5, 64))
    program, _ = lowered(seeded(Two), normal(2, 5, 64), options=options)
    package = Inductor().build(program, captured.example)
    x = normal(3, 7, 64, seed=1)
    # As test_numbers has it.
    assert compare(run_samples(program, [[x]]), [list(package([x]))]).relative_error < 5e-3
