"""Tests of lissom.backends.onnx.integer_matmul and quantization: products of integers, against sums over integers."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lissom
from lissom.backends.names import input_names
from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.integer_matmul import expand_integers
from lissom.backends.onnx.quantized_layers import quantized_layers, simulated
from lissom.backends.onnx.variants import INTEGERS, write_check, write_variant
from tests.support import captures
from tests.support.models import normal, seeded

WIDE = 384
SHAPES = [(1, 1), (2, 5), (3, 7)]
CHANNEL = "MatMulIntegerToFloat"


class Layer(nn.Module):
    """One linear layer, its weight kept either way round."""

    def __init__(self, features: int = WIDE, outputs: int = 24, bias: bool = True, turned: bool = False) -> None:
        super().__init__()
        self.layer = Conv1D(outputs, features) if turned else nn.Linear(features, outputs, bias=bias)
        if turned:
            nn.init.normal_(self.layer.bias)

    @property
    def matrix(self) -> np.ndarray:
        """The weight as [features in, features out]."""
        weight = self.layer.weight.detach().double().numpy()
        return weight if isinstance(self.layer, Conv1D) else weight.T

    @property
    def bias(self) -> np.ndarray | float:
        return 0.0 if self.layer.bias is None else self.layer.bias.detach().double().numpy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Tables(nn.Module):
    """Looks up rows and multiplies with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.table(ids))))


def exported(model, inputs, options, data=()):
    """The program after `quantize` with these options, and its exported model, as ONNX Runtime is given it."""
    passes = f"quantize{{lm_head=true{options and f',{options}'}}},fold-quantized-weights"
    program = captures.optimize(model, inputs, passes=passes, data=data).program
    return program, export_onnx(program, program.signature.flatten((inputs,), {}), decompose=False)


@cache
def exported_layer(options):
    """A `Layer`, which nothing changes, once for all tests of one format."""
    return exported(seeded(Layer), normal(2, 5, WIDE), options)


@cache
def exported_tables(options):
    """The same of `Tables`."""
    return exported(seeded(Tables), torch.tensor([[3, 0, 19], [5, 5, 1]]), options)


def run(program, model, folder, x):
    """What a plain session gives, and the operators it runs."""
    path = save_onnx(model, folder)
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    results = session.run(None, {input_names(program)[0]: x.numpy()})
    return results, [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def rounded_values(x, by_token, calibration=None):
    """Integers, scale and zero point of each row, or of all: q = round(x / s) + z in 0 to 255, zero in range."""
    x = x.double().numpy()
    source = x if calibration is None else calibration.double().numpy()
    axis = -1 if by_token else None
    low = np.minimum(source.min(axis, keepdims=True), 0)
    high = np.maximum(source.max(axis, keepdims=True), 0)
    scale = (high - low) / 255
    zero_point = np.rint(-low / scale)
    return np.clip(np.rint(x / scale) + zero_point, 0, 255).astype(np.int64), scale, zero_point.astype(np.int64)


def rounded_weight(matrix, group, bits):
    """The symmetric weight: whole numbers and their scales, both [features in, features out]."""
    blocks = matrix.reshape(-1, group, matrix.shape[1])
    high = 2 ** (bits - 1) - 1
    scale = np.abs(blocks).max(1, keepdims=True) / high
    if group < matrix.shape[0]:
        scale = scale.astype(np.float16).astype(np.float64)
    q = np.clip(np.rint(blocks / scale), -high - 1, high)
    return q.reshape(matrix.shape).astype(np.int64), np.broadcast_to(scale, blocks.shape).reshape(matrix.shape)


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "addmm"])
@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
def test_values_and_weights_are_multiplied_as_integers(scheme, turned, tmp_path):
    model = seeded(lambda: Layer(turned=turned))
    data = normal(4, 6, WIDE, seed=9)
    options = {
        "token": "",
        "tensor": "activations=tensor",
        "static": "scheme=int8-static",
    }[scheme]
    program, export = exported(model, normal(2, 5, WIDE), options, [data] if scheme == "static" else ())
    assert simulated(quantized_layers(export), 0) == []
    written, places = write_variant(export, [INTEGERS])
    assert places[INTEGERS] == 1
    weight, weight_scale = rounded_weight(model.matrix, WIDE, 8)
    for shape in SHAPES:
        x = normal(*shape, WIDE, seed=3) + 0.3
        (found,), operators = run(program, written, tmp_path, x)
        q, scale, zero_point = rounded_values(x, scheme == "token", data if scheme == "static" else None)
        wanted = (q - zero_point) @ weight * scale * weight_scale[:1] + model.bias
        # Sums of integers are exact; float32 scales them, unit roundoff 6e-8, some three times.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
        assert {"MatMul", "Gemm", "FusedMatMul"}.isdisjoint(operators)
        assert sum(operator in (CHANNEL, "DynamicQuantizeMatMul") for operator in operators) == 1
    assert any("_integers_" in name for name in written.graph.initializers) == (scheme == "token")


def test_many_zero_point_rows_are_subtracted_after_the_product(tmp_path):
    model = seeded(Layer)
    with torch.no_grad():
        model.layer.weight.abs_()
    program, export = exported(model, normal(2, 5, WIDE), "")
    x = normal(2, 5, WIDE, seed=3)
    written, _ = write_variant(export, [INTEGERS])
    (found,), operators = run(program, written, tmp_path, x)
    assert operators.count(CHANNEL) == 1
    assert not any("_integers_" in name for name in written.graph.initializers)
    q, scale, zero_point = rounded_values(x, by_token=True)
    weight, weight_scale = rounded_weight(model.matrix, WIDE, 8)
    wanted = (q - zero_point) @ weight * scale * weight_scale[:1] + model.bias
    # Two terms of up to 384 · 127 · 255 cancel in float32, unit roundoff 6e-8, against a sum a hundredth of them.
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("group", "features"), [(16, 96), (32, 96), (64, 192), (48, 96)])
def test_weights_of_four_bits_stay_as_they_are_stored(group, features, bias, tmp_path):
    model = seeded(lambda: Layer(features, 10, bias))
    options = f"scheme=int4-weight,group={group},symmetric=true,weight_observer=min-max"
    program, export = exported(model, normal(2, 5, features), options)
    weight, scale = rounded_weight(model.matrix, group, 4)
    for shape in SHAPES:
        x = normal(*shape, features, seed=3)
        (found,), operators = run(program, write_variant(export, [INTEGERS])[0], tmp_path, x)
        assert operators.count("MatMulNBits") == 1
        assert "MatMul" not in operators
        # Sums of at most 192 terms of float32.
        np.testing.assert_allclose(found, x.double().numpy() @ (weight * scale) + model.bias, rtol=1e-4, atol=1e-5)


OPTIONS = [
    "symmetric=false",
    "granularity=tensor",
    "activations=tensor,symmetric=false",
    "scheme=int4-weight,group=16,symmetric=false",
    "scheme=int4-weight,granularity=channel,symmetric=true",
    "scheme=int8-weight",
    "scheme=int8-group",
    "scheme=int4-dynamic",
    "scheme=fp8",
    "scheme=fp8,activations=tensor",
]


@pytest.mark.parametrize("form", [(), (INTEGERS,)], ids=["plain", "integers"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_format_gives_what_the_program_gives(options, form, tmp_path):
    program, export = exported_layer(options)
    assert len(quantized_layers(export)) == 1
    x = normal(3, 4, WIDE, seed=3)
    (found,), _ = run(program, write_variant(export, form)[0], tmp_path, x)
    # Both sum float32 in some order; no value of these is half way between two steps.
    torch.testing.assert_close(torch.from_numpy(found), program.run([x])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [(), (INTEGERS,)], ids=["plain", "integers"])
@pytest.mark.parametrize(
    "options", ["int8-weight", "int4-weight,group=8,symmetric=true", "int4-weight,group=16,symmetric=false"]
)
def test_tables_are_looked_up_before_they_are_turned_back(options, form, tmp_path):
    ids = torch.tensor([[3, 0, 19], [5, 5, 1]])
    program, export = exported_tables(f"scheme={options},embeddings=true")
    (found,), operators = run(program, write_variant(export, form)[0], tmp_path, ids)
    # Sums of 32 terms of float32, twice.
    torch.testing.assert_close(torch.from_numpy(found), program.run([ids])[0], rtol=1e-4, atol=1e-5)
    assert "Gather" in operators


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("scheme=fp8", "ONNX Runtime has no products of fp8 on a CPU"),
        ("granularity=group", "a product of integers takes a scale for each channel, and it has one for each group"),
        ("scheme=int4-weight,group=8", "MatMulNBits takes groups of 16 neighbours and more, and it has 8"),
        ("scheme=int4-dynamic,group=16", "takes groups of 32 neighbours and more with rounded activations, and it has 16"),
        ("scheme=int8-weight", "as OnnxRuntime(accuracy_level=4) lets it"),
    ],
)
def test_a_layer_without_a_product_of_integers_says_why(options, reason):
    _, export = exported_layer(options)
    (left,) = simulated(quantized_layers(export), 0)
    assert reason in left.reason
    assert left.module == "layer"
    assert write_variant(export, [INTEGERS])[1][INTEGERS] == 0


def test_small_models_multiply_eight_bits_without_rounding_activations(tmp_path):
    program, export = exported_layer("scheme=int8-weight")
    model = export.clone()
    assert expand_integers(model) == 0 and expand_integers(model, small=True) == 1
    x = normal(2, 5, WIDE)
    (found,), _ = run(program, write_variant(model, [])[0], tmp_path, x)
    # float32: sums of 384 products in another order.
    torch.testing.assert_close(torch.from_numpy(found), program(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("options", ["", "activations=tensor", "scheme=int4-weight", "scheme=int8-group"])
def test_products_are_compared_beside_each_other(options, accuracy_level, tmp_path):
    program, export = exported_layer(options)
    x = normal(3, 4, WIDE, seed=3)
    (found, error), _ = run(program, write_check(export, accuracy_level), tmp_path, x)
    torch.testing.assert_close(torch.from_numpy(found), program.run([x])[0], rtol=1e-4, atol=1e-5)
    rounds = accuracy_level and "int4" in options
    # Float32 sums; or values rounded to eight bits in groups, 4e-3 of the largest each.
    assert (1e-4 if rounds else 0.0) <= error < (3e-2 if rounds else 1e-5)


class Twice(nn.Module):
    """One layer called twice, as the layers of ALBERT are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDE, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_layers_that_share_weight_are_both_products_of_integers() -> None:
    """ONNX Runtime rewrites weights of such products where they may overflow, and failed at the second of one weight."""
    model, x = seeded(Twice), normal(2, 5, WIDE)
    passes = "quantize{scheme=int8-dynamic,lm_head=true}"
    program = captures.optimize(model, x, passes=passes).program
    compiled = captures.compile(model, x, passes=passes, backend=lissom.OnnxRuntime(timing_seconds=0), goal=None)
    # Sums of whole numbers are exact; scales are multiplied in another order.
    torch.testing.assert_close(compiled(x), program.run([x])[0], rtol=1e-5, atol=1e-5)
