"""Tests of lissom.backends.onnx.experts: quantized experts in ONNX."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lissom.backends.onnx.experts import split_experts
from lissom.backends.onnx.rewriting import nodes_of
from lissom.backends.onnx.translation import DEQUANTIZE, DOMAIN
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.errors import UnsupportedError
from tests.support import captures
from tests.support.mixtures import mixture, samples
from tests.support.neighbours import all_but_slow


@pytest.mark.parametrize(
    "passes",
    all_but_slow(
        ["quantize{scheme=int4-weight}", "quantize{scheme=int8-dynamic}", "quantize{scheme=int8-weight}"],
        *("quantize{scheme=int8-dynamic}", "quantize{scheme=int8-weight}"),
    ),
)
@pytest.mark.parametrize("name", all_but_slow(["mixtral", "gpt-oss"], "mixtral"))
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
    "passes",
    all_but_slow(
        ["quantize{scheme=int4-weight}", "quantize{scheme=int8-dynamic}", "quantize{scheme=int8-static}"],
        "quantize{scheme=int8-dynamic}",
    ),
)
@pytest.mark.parametrize("name", all_but_slow(["mixtral", "gpt-oss"], "mixtral"))
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


def gathered(index: object, perm: list[int] | None) -> ir.Model:
    """A model that gathers an expert from a stack of transposed matrices."""
    tape = ir.tape.Tape()
    stack, scale = (
        tape.op("Constant", [], {"value": ir.tensor(array)})
        for array in (np.ones((2, 3, 3), np.int8), np.ones((2, 3, 1), np.float32))
    )
    stored = tape.op(DEQUANTIZE, [stack, scale], {"format": "int8"}, domain=DOMAIN)
    stored.shape, stored.type = ir.Shape([2, 3, 3]), ir.TensorType(ir.DataType.FLOAT)
    swapped = tape.op("Transpose", [stored], {} if perm is None else {"perm": perm})
    chosen = tape.op("Constant", [], {"value": ir.tensor(np.array(index))})
    result = tape.op("Gather", [swapped, chosen])
    graph = ir.Graph([], [result], nodes=tape.nodes, opset_imports={"": 21, DOMAIN: 1}, name="gathered")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("index", "perm", "left"),
    [(1, [0, 2, 1], 0), ([1], [0, 2, 1], 1), ([0, 1], [0, 2, 1], 1), (1, [2, 1, 0], 1), (1, None, 1)],
)
def test_one_expert_of_a_swapped_stack_is_taken_out(index: object, perm: list[int] | None, left: int) -> None:
    """A list of one index keeps a dimension, and another order of dimensions is not that of matrices."""
    model = gathered(index, perm)
    split_experts(model)
    assert len(nodes_of(model, "", "Gather")) == left
