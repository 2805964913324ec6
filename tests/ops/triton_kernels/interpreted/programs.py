"""Compiled programs on the pretended GPU whose Triton kernels run in the interpreter, beside their simulation on the CPU."""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest

import lissom
from lissom.ops import int4_product, int8_product
from tests.ops.triton_kernels.interpreted.launching import launches as launches
from tests.support.cuda_models import LAYERS, LINEAR, MODELS, on_cuda, same_as
from tests.support.models import Case
from tools.pretend_cuda import pretend_cuda

# The interpreter has no products of bfloat16: models with int4 weights are in float16. The first cases run each time.
CASES = [
    ("bert", "quantize", int8_product, False),
    ("bert", "quantize{scheme=int4-weight,group=4,symmetric=false}", int4_product, True),
    ("llama", "quantize{scheme=int4-weight,group=4,symmetric=true}", int4_product, True),
    ("llama", "quantize{activations=tensor}", int8_product, False),
    ("bert", "quantize{scheme=int8-static}", int8_product, False),
    ("llama", "cast{dtype=bf16},quantize", int8_product, False),
]


@pytest.mark.parametrize(("name", "passes", "product", "half"), CASES[: int(os.environ["TRITON_CASES"])])
def test_a_program_is_its_simulation(name: str, passes: str, product: object, half: bool, launches: Counter[object]) -> None:
    case = MODELS[name]()
    case = Case(case.model.half() if half else case.model, case.inputs)
    simulated = lissom.optimize(case.model, case.inputs, passes=passes, data=[case.inputs]).program
    with pretend_cuda():
        inputs = on_cuda(case)
        fast = lissom.compile(copy.deepcopy(case.model).cuda(), inputs, passes=passes, data=[inputs], goal=None)
        assert len(fast.program.nodes(product)) == LAYERS * LINEAR[name]
        launches.clear()
        same_as(simulated, case, fast)
    assert launches[product] >= LAYERS * LINEAR[name]
