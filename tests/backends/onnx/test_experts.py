"""Tests of lissom.backends.onnx.experts: quantized experts in ONNX."""

from __future__ import annotations

import pytest

from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.errors import UnsupportedError
from tests import captures
from tests.mixtures import mixture, samples


@pytest.mark.parametrize(
    "passes", ["quantize{scheme=int4-weight}", "quantize{scheme=int8-dynamic}", "quantize{scheme=int8-weight}"]
)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_quantized_experts_run(name: str, passes: str) -> None:
    given = samples()
    wanted = captures.optimize(mixture(name), given[0], passes=passes, data=given, checks="structural").program
    model = captures.compile(
        mixture(name), given[0], passes=passes, data=given, backend=OnnxRuntime(timing_seconds=0), simulate=True
    )
    found = model(**given[0])
    # The same integers, summed in another order; an activation between two integers may be rounded to the other.
    exact = wanted.run(list(given[0].values()))[0]
    assert float((found.logits - exact).norm() / exact.norm()) < (1e-5 if "weight" in passes else 1e-2)


@pytest.mark.parametrize(
    "passes", ["quantize{scheme=int4-weight}", "quantize{scheme=int8-dynamic}", "quantize{scheme=int8-static}"]
)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_have_kernels(name: str, passes: str) -> None:
    """Without `simulate=True` a layer without a kernel is refused; of one token, some experts read no row."""
    given, single = samples(), samples(1, length=1)[0]
    wanted = captures.optimize(mixture(name), given[0], passes=passes, data=given, checks="structural").program
    model = captures.compile(mixture(name), given[0], passes=passes, data=given, backend=OnnxRuntime(timing_seconds=0))
    found, exact = model(**single).logits, wanted.run(list(single.values()))[0]
    # An activation between two integers may be rounded to the other.
    assert float((found - exact).norm() / exact.norm()) < (1e-5 if "weight" in passes else 2e-2)


def test_experts_without_a_kernel_are_counted() -> None:
    given = samples()
    with pytest.raises(UnsupportedError, match=r"has no kernel for \d+ quantized layers"):
        captures.compile(
            mixture("mixtral"),
            given[0],
            passes="quantize{scheme=int8-weight,only=*.experts}",
            backend=OnnxRuntime(timing_seconds=0),
        )
