"""Tests of lissom.backends.openvino.integers and executed: which quantized layers run in integers, and what is refused."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.backends.onnx.quantization import Stored
from lissom.backends.openvino.integers import rounded_by_kernels
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import UnsupportedError, VerifyError
from lissom.ops.formats import FORMATS
from tests.support.models import Case, normal, seeded

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")


class Layers(torch.nn.Module):
    """Two linear layers whose sizes are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def layers() -> Case:
    return Case(seeded(Layers), (normal(2, 5, 64),))


def compiled(passes: str, **options: object) -> lissom.CompiledModel:
    case = layers()
    return lissom.compile(
        case.model, case.inputs, passes=passes, backend="openvino", data=[normal(4, 7, 64, seed=1)], goal=None, **options
    )


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        ("int8-static", "2 products from integers"),
        ("int8-weight", "2 products with integer weights"),
        ("int4-weight", "2 products with integer weights"),
        ("int8-group", "2 products from integers"),
        ("int4-dynamic", "2 products from integers"),
    ],
)
def test_schemes_run_in_integers(tmp_path, scheme, kernels):
    fast = compiled(f"quantize{{scheme={scheme}}}")
    assert f"2 of 2 quantized layers run in integers: {kernels}" in fast.report.history.steps[-1].notes
    fast.save(tmp_path / "saved")
    again = lissom.load(tmp_path / "saved")
    for batch, tokens in ((1, 1), (3, 9)):
        x = normal(batch, tokens, 64, seed=batch)
        with torch.no_grad():
            (wanted,) = fast.program.run([x])
        # Float32 products of equal integers; one activation rounded the other way moves a sum of 64 terms by 1e-3 at most.
        assert relative_error(wanted, fast(x)) < 1e-3
        assert torch.equal(again(x), fast(x))


def test_activations_of_weight_only_layers_stay_in_floating_point():
    fast = compiled("quantize{scheme=int8-weight}")
    x = normal(3, 9, 64, seed=3)
    with torch.no_grad():
        (wanted,) = fast.program.run([x])
    # Sums of 96 terms of float32; OpenVINO's default, activations in int8, is off by 1e-3.
    assert relative_error(wanted, fast(x)) < 1e-5


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ("quantize", "int8 weights on uint8 activations: OpenVINO has no kernel that quantizes activations per token or per "),
        ("quantize{activations=tensor}", "int8 weights on uint8 activations: OpenVINO has no kernel that quantizes "),
        ("quantize{scheme=fp8}", "fp8 weights on fp8 activations: OpenVINO has no products of fp8 on a CPU"),
        (
            'quantize{scheme=int8-group,schemes="up=int8-weight"}',
            "OpenVINO quantizes activations only where all layers ",
        ),
        ("cast{dtype=bf16},quantize{scheme=int8-static}", "OpenVINO's product reads its weight in "),
    ],
)
def test_layers_without_a_kernel_are_refused_or_simulated(passes, reason):
    with pytest.raises(UnsupportedError) as caught:
        compiled(passes)
    assert str(caught.value).startswith("backend 'openvino' has no kernel for ") and reason in str(caught.value)
    fast = compiled(passes, simulate=True)
    x = normal(3, 9, 64, seed=3)
    with torch.no_grad():
        (wanted,) = fast.program.run([x])
    # An activation of bfloat16, fp8 or int8 that is rounded the other way, 6e-2, 6e-2 and 4e-3, in sums of 64 terms.
    assert relative_error(wanted, fast(x)) < (2e-2 if "fp8" in passes or "bf16" in passes else 1e-3)
    assert " in floating point on quantized values: " in fast.report.history.steps[-1].notes[-1]


def test_weights_in_block_formats_are_refused():
    with pytest.raises(UnsupportedError, match=r"OpenVINO has no kernel on a CPU for 'up\.weight' of Layers, a weight in fp4"):
        compiled("quantize{scheme=mxfp4-weight}")


def test_integer_products_are_checked():
    names = {"a": (0, "rounded"), "b": (1, "rounded"), "c": (1, "plain"), "d": (2, "rounded"), "e": (2, "plain")}
    # The second rounds its activations as the program does, the third not at all.
    errors = {"a": 1e-6, "b": 1e-6, "c": 4e-3, "d": 4e-3, "e": 1e-6}
    assert rounded_by_kernels(errors, names) == {1}
    for wrong in (0.1, float("nan")):
        with pytest.raises(VerifyError, match="an integer product has a relative error of"):
            rounded_by_kernels(errors | {"a": wrong}, names)


def test_stored_weights_as_floats():
    q = torch.tensor([[0, 3], [15, 8]], dtype=torch.uint8).numpy()
    scale, points = torch.tensor([[0.5, 2.0]]).numpy(), torch.tensor([[1, 8]], dtype=torch.uint8).numpy()
    assert Stored(q, scale, points, FORMATS["uint8"]).floats().tolist() == [[-0.5, -10.0], [7.0, 0.0]]
    # A zero point in floating point is subtracted after scaling.
    assert Stored(q, scale, points.astype("float32"), FORMATS["uint8"]).floats().tolist() == [[-1.0, -2.0], [6.5, 8.0]]
