"""Tests of pack-quantized-linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.eager.backend import Eager
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.ops import (
    grouped_product,
    quantized_linear,
    quantized_linear_grouped,
    quantized_linear_norm,
    weight_quantized_linear,
    weight_quantized_linear_grouped,
    weight_quantized_linear_norm,
)
from lissom.ops.native import kernel_dtypes, missing_int8_kernel, reads_few_bits_faster
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic
from lissom.ops.quantized_linear import unpack_bytes
from tests.support import captures
from tests.support.harness import apply, aten, calls, check_golden, rewrite
from tests.support.mixtures import mixture, samples
from tests.support.models import Case, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama
from tests.support.neighbours import all_but_slow

LOWERING = ",fold-quantized-weights,pack-quantized-linear"
needs_kernel = pytest.mark.skipif(
    missing_int8_kernel(torch.float32, torch.device("cpu")) is not None, reason="no kernel for bytes here"
)
pytestmark = needs_kernel
in_bfloat16 = pytest.mark.skipif(torch.bfloat16 not in kernel_dtypes(), reason="no kernels in bfloat16 here")
CASTS = ["", pytest.param("cast{dtype=bf16},", marks=in_bfloat16)]


class Two(nn.Module):
    """A layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Tied(nn.Module):
    """An LM head that is the embedding, and a layer used twice."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(35, width), nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.twice(self.twice(self.table(tokens))), self.table.weight)


class Turned(nn.Module):
    """Weights kept as [features in, features out]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bias = (nn.Parameter(normal(*sizes)) for sizes in ((6, 34), (34, 4), (4,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.mm(x, self.first), self.second)


def rounded(module: nn.Module, *args: torch.Tensor, options: str = "") -> Program:
    """The module with Q/DQ; its last layer is an LM head, as far as can be seen."""
    return rewrite(f"quantize{{lm_head=true{options}}}", module, *args)[0]


def packed(module: nn.Module, *args: torch.Tensor, options: str = "") -> tuple[Program, History]:
    return rewrite(f"quantize{{lm_head=true{options}}}{LOWERING}", module, *args)


def reasons(history: History) -> list[str]:
    return [skip.reason for skip in history.steps[-1].skipped]


def close(left: torch.Tensor, right: torch.Tensor, allowed: float) -> None:
    assert float((left - right).detach().norm() / right.detach().norm()) < allowed


def test_rewrites() -> None:
    _, history = packed(seeded(Two), normal(2, 5, 6))
    check_golden("pack_quantized_linear", history.diff(2, 3))


@pytest.mark.parametrize("options", ["", ",granularity=tensor", ",activations=tensor"])
def test_numbers(options: str) -> None:
    module = seeded(Two)
    before = rounded(module, normal(2, 5, 6), options=options)
    program, _ = packed(module, normal(2, 5, 6), options=options)
    assert calls(program, quantized_linear) == 2
    assert calls(program, aten.linear.default, dequantize, fake_quantize_dynamic) == 0
    x = normal(3, 7, 6, seed=1)
    # The second layer's input is half way between two steps in few places, if in any; there one step is 1/255 of its range.
    close(program(x), before(x), 2e-3)


def test_packed_weight_takes_place_of_stored_one() -> None:
    program, _ = packed(seeded(Two), normal(2, 5, 6))
    folded, _ = rewrite("quantize,fold-quantized-weights", seeded(Two), normal(2, 5, 6))
    kept = [f"{name}.weight_int8_packed{leaf}" for name in ("down", "up") for leaf in ("", "_scale", "_sums")]
    assert sorted(program.weights()) == sorted([*kept, "up.bias"])
    q = unpack_bytes(program.weight("up.weight_int8_packed"), 40, 6)
    assert torch.equal(q, folded.weight("up.weight_int8"))
    assert torch.equal(program.weight("up.weight_int8_packed_sums")[:40], q.sum(1, dtype=torch.int32))


def test_weights_kept_the_other_way_round_are_turned() -> None:
    module = seeded(Turned)
    before = rounded(module, normal(9, 6))
    program, _ = packed(module, normal(9, 6))
    assert [str(node.target) for node in program.nodes()] == ["lissom.quantized_linear.default"] * 2
    close(program(normal(9, 6)), before(normal(9, 6)), 2e-3)


def test_tied_table_is_held_once_and_looked_up_packed() -> None:
    module = seeded(Tied)
    tokens = torch.tensor([[1, 2, 34], [31, 32, 33]])
    before = rounded(module, tokens, options=",embeddings=true")
    program, _ = packed(module, tokens, options=",embeddings=true")
    assert calls(program, quantized_linear) == 3
    stored = [name for name, weight in program.weights().items() if weight.numel() > 100 and weight.dtype == torch.int8]
    assert sorted(stored) == ["table.weight_int8_packed", "twice.weight_int8_packed"]
    close(program(tokens), before(tokens), 2e-3)


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("int8-dynamic,granularity=group,group=4", 8),
        ("int8-group", 32),
        ("int4-dynamic", 32),
        ("int4-dynamic,symmetric=true", 32),
    ],
)
def test_scales_of_groups_are_read_by_the_kernel(scheme: str, width: int) -> None:
    module, tokens = Tied(width).eval(), torch.tensor([[1, 2, 34], [31, 32, 33]])
    options = f",scheme={scheme},embeddings=true"
    before = rounded(module, tokens, options=options)
    program, _ = packed(module, tokens, options=options)
    assert calls(program, quantized_linear) == 3
    assert calls(program, aten.linear.default, fake_quantize_dynamic) == 0
    close(program(tokens), before(tokens), 2e-3)
    if scheme.startswith("int4"):
        stored = {name: weight.shape for name, weight in program.weights().items() if weight.dtype == torch.uint8}
        assert stored[f"table.weight_{'' if 'symmetric' in scheme else 'u'}int4_packed"] == (2, 8, 16, 4)


STORED = [
    "int8-weight",
    "int8-weight,symmetric=false",
    "int8-weight,granularity=tensor",
    "int8-weight,granularity=group,group=2",
    "int4-weight,group=2",
    "int4-weight,group=2,symmetric=true",
    "int4-weight,granularity=channel",
]


@pytest.mark.parametrize("options", STORED)
@pytest.mark.parametrize("make", [Two, Turned, Tied])
def test_weights_alone_in_integers(make: Callable[[], nn.Module], options: str) -> None:
    module = seeded(make)
    example = torch.tensor([[1, 2, 34], [18, 32, 33]]) if make is Tied else normal(9, 6)
    options = f",scheme={options}" + (",embeddings=true" if make is Tied else "")
    before = rounded(module, example, options=options)
    program, _ = packed(module, example, options=options)
    assert calls(program, weight_quantized_linear) == calls(before, aten.linear.default, aten.addmm.default, aten.mm.default)
    # Sums of up to forty products of floats in another order.
    torch.testing.assert_close(program(example), before(example), rtol=1e-5, atol=1e-5)
    stored = [name for name, weight in program.weights().items() if not weight.is_floating_point() and weight.numel() > 500]
    assert len(stored) < 3


def test_a_known_scale_goes_into_the_kernel() -> None:
    module, x = seeded(Two), normal(2, 5, 6)
    data = [normal(2, 5, 6, seed=seed) for seed in range(4)]
    compiled = captures.compile(module, x, passes="quantize{scheme=int8-static,lm_head=true}", data=data)
    (first, *_) = compiled.program.nodes(quantized_linear)
    assert calls(compiled.program, quantized_linear) == 2
    assert calls(compiled.program, fake_quantize) == 0
    assert str(first.args[4].target).endswith("_scale")  # pyright: ignore
    close(compiled(x), module(x), 0.02)


LEFT = {
    ",symmetric=false": "its weight is in uint8, and the kernel multiplies with int8, int4 or uint4",
    ",granularity=group,group=2": "2 of its inputs share a scale, and the kernel takes a multiple of 4",
    ",scheme=fp8": "its weight is in fp8, and the kernel multiplies with int8, int4 or uint4",
}


@pytest.mark.parametrize("options", LEFT)
def test_what_has_no_kernel_is_left_with_the_reason(options: str) -> None:
    program, history = packed(seeded(Two), normal(2, 5, 6), options=options)
    assert calls(program, aten.linear.default) == 2
    assert reasons(history) == [LEFT[options]] * 2


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite("pack-quantized-linear", seeded(Two), normal(2, 5, 6))
    assert history.texts[0] == history.texts[1]
    assert not reasons(history)


MODELS = {
    # Layers a block: q, k and v are one, and what follows a layer is fused into it.
    "bert": (tiny_bert, {quantized_linear: 2, quantized_linear_norm: 2}),
    "gpt2": (tiny_gpt2, {quantized_linear: 4}),
    "llama": (tiny_llama, {quantized_linear: 5}),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_run_on_integers(name: str, cast: str) -> None:
    make, wanted = MODELS[name]
    case: Case = make()
    compiled = captures.compile(case.model, case.inputs, passes=f"{cast}quantize", checks="numeric")
    program, layers = compiled.program, case.model.config.num_hidden_layers
    assert {target: calls(program, target) for target in wanted} == {key: count * layers for key, count in wanted.items()}
    assert calls(program, dequantize, fake_quantize, fake_quantize_dynamic) == 0
    step = next(item for item in compiled.report.history.steps if item.spelling == "pack-quantized-linear")
    assert not step.skipped


@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight,group=8"])
@pytest.mark.parametrize("cast", CASTS)
def test_whole_models_run_on_stored_integers(scheme: str, cast: str) -> None:
    case = tiny_bert()
    passes = f"{cast}quantize{{scheme={scheme}}}"
    program = captures.compile(case.model, case.inputs, passes=passes, checks="numeric").program
    assert (calls(program, weight_quantized_linear), calls(program, weight_quantized_linear_norm)) == (4, 4)
    assert calls(program, dequantize) == 0


@pytest.mark.parametrize("cast", CASTS)
def test_composes_and_is_saved_and_loaded(cast: str, tmp_path: Path) -> None:
    case = tiny_bert()
    passes = f"prune-heads{{keep=0.5}},eliminate-dead,{cast}quantize"
    compiled = captures.compile(case.model, case.inputs, passes=passes)
    compiled.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")
    call: Callable[..., object] = lambda run: run(**case.inputs).last_hidden_state  # noqa: E731
    assert torch.equal(call(loaded), call(compiled))  # pyright: ignore


@pytest.mark.parametrize(("low", "high", "format"), [(-16, 15, "int5"), (-32, 31, "int6"), (-33, 0, "int8"), (0, 16, "int6")])
def test_weights_that_need_fewer_bits_are_packed_in_fewer(low: int, high: int, format: str) -> None:
    module = nn.Linear(8, 40)
    module.weight = nn.Parameter((normal(40, 8) * 9).round().clamp(low, high))
    with torch.no_grad():
        module.weight[:, 0], module.weight[:, 1] = low, high
    program = rewrite("quantize{scheme=int8-weight,lm_head=true}", module, normal(3, 8))[0]
    (node,) = program.nodes(fake_quantize)
    program.set_weight(str(node.args[1].target), torch.ones(40, 1))
    found, _ = apply("fold-quantized-weights,pack-quantized-linear", program, [normal(3, 8)])
    (layer,) = found.nodes(weight_quantized_linear)
    assert layer.kwargs["format"] == (format if reads_few_bits_faster() else "int8")
    torch.testing.assert_close(found.run([normal(3, 8)])[0], module(normal(3, 8)), rtol=1e-5, atol=1e-4)


EXPERT_SCHEMES = {
    "int8-weight": weight_quantized_linear_grouped,
    "int4-weight": weight_quantized_linear_grouped,
    "int8-dynamic": quantized_linear_grouped,
    "int8-static": quantized_linear_grouped,
    "int8-group": quantized_linear_grouped,
    "int4-dynamic": quantized_linear_grouped,
}


# Stacks are [experts, out_features, in_features] in Mixtral, the other way round and with biases in GPT-OSS. The other two
# have stacks as Mixtral does.
EXPERT_CASES = [(name, scheme) for name in ("mixtral", "gpt-oss") for scheme in EXPERT_SCHEMES]
EXPERT_CASES += [("qwen3-moe", "int8-dynamic"), ("deepseek-v3", "int8-dynamic"), ("deepseek-v3", "int4-weight")]
QUICK_EXPERTS = {*EXPERT_CASES} - {("gpt-oss", "int8-weight"), ("deepseek-v3", "int8-dynamic")}


@pytest.mark.parametrize(("name", "scheme"), all_but_slow(EXPERT_CASES, *QUICK_EXPERTS))
def test_experts_have_kernels(name: str, scheme: str) -> None:
    given, passes = samples(), f"quantize{{scheme={scheme}}}"
    wanted = captures.optimize(mixture(name), given[0], passes=passes, data=given, checks="structural").program
    model = captures.compile(mixture(name), given[0], passes=passes, data=given, backend=Eager())
    assert calls(model.program, EXPERT_SCHEMES[scheme]) == 2
    found = model(**given[0]).logits
    # The same integers, summed in another order; an activation between two integers may be rounded to the other.
    exact = scheme.endswith("-weight")
    found, wanted = found.flatten(), wanted.run(list(given[0].values()))[0].flatten()
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if exact else 1e-2)


def test_experts_share_no_scale_of_a_tensor() -> None:
    given, passes = samples(1), "quantize{scheme=int8-dynamic,activations=tensor}"
    with pytest.raises(UnsupportedError, match="its input has one scale for the rows of all experts"):
        captures.compile(mixture("mixtral"), given[0], passes=passes, backend=Eager())
    model = captures.compile(mixture("mixtral"), given[0], passes=passes, backend=Eager(), simulate=True)
    assert calls(model.program, grouped_product) == 2


@pytest.mark.parametrize("passes", ["quantize{scheme=int8-dynamic}", "quantize{scheme=int4-weight}"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_quantized_experts_are_saved_and_loaded(name: str, passes: str, tmp_path: Path) -> None:
    given = samples(1)
    model = captures.compile(mixture(name), given[0], passes=passes, backend=Eager())
    model.save(tmp_path / "artifact")
    loaded = lissom.load(tmp_path / "artifact")
    assert torch.equal(loaded(**given[0]).logits, model(**given[0]).logits)


class Known(nn.Module):
    """A layer whose input is quantized with computed scales, one for each index of all dimensions but `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("q", torch.arange(-24, 24, dtype=torch.int8).view(8, 6))
        self.register_buffer("scale", torch.rand(8, 1, generator=torch.Generator().manual_seed(0)) / 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(self.dim, keepdim=True).clamp_min(1e-6) / 128
        x = torch.ops.lissom.fake_quantize(x, step, torch.full_like(step, 128.0), format="uint8")
        return nn.functional.linear(x, dequantize(self.q, self.scale, format="int8", dtype=torch.float32))


def test_a_known_scale_for_each_row() -> None:
    program, history = rewrite("pack-quantized-linear", Known(-1), normal(2, 5, 6))
    assert reasons(history) == [] and calls(program, quantized_linear) == 1 and calls(program, fake_quantize) == 0
    close(program(normal(3, 7, 6)), Known(-1)(normal(3, 7, 6)), 1e-6)


def test_other_known_scales_have_no_kernel() -> None:
    program, history = rewrite("pack-quantized-linear", Known(1), normal(2, 5, 6))
    assert reasons(history) == ["its input is quantized with known scales that are neither one nor one for each row"]
    assert calls(program, fake_quantize) == 1
