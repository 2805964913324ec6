"""Tests of lissom.backends.simulated_layers: quantized layers without a kernel are refused, or told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends.simulated_layers import SimulatedLayer, account, count_kernels, explain, refuse, simulated_layers
from lissom.compiler.ir.editor import Skip
from lissom.compiler.pipeline.history import Size, Step
from lissom.compiler.verify.divergence import compare, run_samples
from lissom.errors import UnsupportedError
from tests.support import captures
from tests.support.models import feed_forward, normal, seeded, tiny_bert, tiny_gpt2

FP8 = "quantize{scheme=fp8}"


def optimized(passes, case=None):
    case = case or feed_forward()
    return captures.optimize(case.model, case.inputs, passes=passes, data=[case.inputs]).program


@pytest.mark.parametrize(
    ("passes", "format"),
    [
        ("quantize", "int8 weights (per-channel) on uint8 activations (per-token)"),
        ("quantize{activations=tensor}", "int8 weights (per-channel) on uint8 activations (per-tensor)"),
        ("quantize{scheme=int8-static}", "int8 weights (per-channel) on uint8 activations (static)"),
        ("quantize{scheme=int8-weight,granularity=tensor}", "int8 weights (per-tensor)"),
        ("quantize{scheme=int4-weight,group=4}", "uint4 weights (groups of 4)"),
        (FP8, "fp8 weights (per-channel) on fp8 activations (per-token)"),
    ],
)
@pytest.mark.parametrize("fold", ["", ",fold-quantized-weights"])
def test_layers_that_read_rounded_values_are_told(passes, format, fold):
    layers = simulated_layers(optimized(passes + fold))
    assert [layer.module for layer in layers] == ["up", "down"]
    assert {layer.format for layer in layers} == {format}


def test_weights_kept_the_other_way_round_are_seen():
    layers = simulated_layers(optimized("quantize{scheme=int4-weight,group=8}", tiny_gpt2()))
    assert len(layers) == 8
    assert {layer.format for layer in layers} == {"uint4 weights (groups of 8)"}


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8"])
def test_products_of_pytorch_s_own_are_kernels(scheme):
    passes = f"quantize{{scheme={scheme}}},fold-quantized-weights,lower-quantized-products{{always=true}}"
    program = optimized(passes, tiny_bert())
    left = simulated_layers(program)
    # Sizes of 24 are no multiple of 16, which products of fp8 take.
    assert (count_kernels(program), len(left)) == ((12, 0) if scheme == "int8-dynamic" else (8, 4))


def test_a_program_without_rounding_has_none():
    program = optimized("exact")
    assert simulated_layers(program) == []
    assert count_kernels(program) == 0


class Looked(nn.Module):
    """A table, and a layer that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids))


def test_a_table_of_embeddings_needs_no_kernel():
    ids = torch.tensor([[1, 2, 3]])
    passes = "quantize{scheme=int8-weight,embeddings=true,skip=out},fold-quantized-weights"
    program = captures.optimize(seeded(Looked), ids, passes=passes).program
    assert "lissom.dequantize" in program.text()
    assert simulated_layers(program) == []


def test_refusal_names_layer_format_reason_and_what_to_do():
    layers = [SimulatedLayer("linear", "encoder.up", "fp8 weights", "products of fp8 need a CUDA device")]
    with pytest.raises(UnsupportedError) as caught:
        refuse("eager", layers, 3)
    assert str(caught.value) == (
        "backend 'eager' has no kernel for 1 of 3 quantized layers, first 'encoder.up' with fp8 weights: products of fp8 need "
        "a CUDA device; choose another scheme or backend, or simulate=True to compute them in floating point, no faster than "
        "before"
    )
    refuse("eager", [], 3)


def test_the_account_counts_and_gives_each_reason_once():
    layers = [SimulatedLayer(name, name, "int8 weights", "too narrow") for name in ("a", "b")]
    assert account([], 5, "5 MatMulNBits") == "5 of 5 quantized layers run in integers: 5 MatMulNBits"
    assert account(layers, 5) == "3 of 5 quantized layers run in integers; 2 in floating point on quantized values: too narrow"


def test_a_pass_that_left_a_layer_says_why():
    layers = [SimulatedLayer(name, name, "int8 weights") for name in ("a", "b")]
    left = [("pack-quantized-linear", "a", "too narrow"), ("pack-linear", "b", "its weight is computed")]
    steps = [
        Step(1, spelling, "rewrite", 0, 0, Size(0, 0, 0, 0), skipped=(Skip(node, "", reason),))
        for spelling, node, reason in left
    ]
    assert [layer.reason for layer in explain(layers, steps)] == ["too narrow", SimulatedLayer.reason]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_scheme_without_a_kernel_is_refused(backend):
    case = feed_forward()
    with pytest.raises(
        UnsupportedError, match=f"'{backend}' has no kernel for 2 quantized layers, first 'up' with fp8 weights"
    ):
        captures.compile(case.model, case.inputs, passes=FP8, backend=backend)


def test_simulated_it_runs_and_the_history_says_so():
    case = feed_forward()
    compiled = captures.compile(case.model, case.inputs, passes=FP8, simulate=True)
    told = (
        "0 of 2 quantized layers run in integers; 2 in floating point on quantized values: products of fp8 need a CUDA device"
    )
    assert told in compiled.report.history.steps[-1].notes
    x = normal(3, 7, 8, seed=2)
    wanted = run_samples(optimized(FP8), [[x]])
    assert compare(wanted, [[compiled(x)]]).relative_error < 1e-5
