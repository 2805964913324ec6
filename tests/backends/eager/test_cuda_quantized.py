"""Quantized layers on a CUDA device, on Lissom's kernels and PyTorch's products, beside the program that simulates them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers

import lissom
from lissom.backends.simulated_layers import count_kernels
from lissom.ops import int4_product, int8_product
from lissom.ops.quantization import dequantize
from lissom.ops.triton_kernels import has_kernels
from lissom.passes.lowering.lower_quantized_products.lower_quantized_products import capability
from lissom.passes.lowering.lower_quantized_products.stored_weights import tiles
from tests.support.cuda_models import same_as
from tests.support.harness import aten, calls
from tests.support.models import Case, seeded, tokens
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.gpu

LAYERS, LINEAR = 2, 6
PRODUCTS = {
    "quantize": aten._int_mm.default,
    "quantize{activations=tensor}": aten._int_mm.default,
    "quantize{scheme=int8-static}": aten._int_mm.default,
    "cast{dtype=bf16},quantize": aten._int_mm.default,
    "quantize{scheme=fp8}": aten._scaled_mm.default,
    "cast{dtype=bf16},quantize{scheme=fp8}": aten._scaled_mm.default,
    "cast{dtype=bf16},quantize{scheme=fp8,activations=tensor}": aten._scaled_mm.default,
    "cast{dtype=bf16},quantize{scheme=int4-weight,symmetric=true}": aten._weight_int4pack_mm.default,
    "cast{dtype=bf16},quantize{scheme=int4-weight,group=64,symmetric=false}": aten._weight_int4pack_mm.default,
}
PROGRAMS = [(kernels, passes) for kernels in ("triton", "pytorch") for passes in PRODUCTS]
QUICK = [
    ("triton", "cast{dtype=bf16},quantize{scheme=int4-weight,group=64,symmetric=false}"),
    ("pytorch", "quantize{scheme=int8-static}"),
    *((kernels, "cast{dtype=bf16},quantize{scheme=fp8}") for kernels in ("triton", "pytorch")),
]


def bert() -> Case:
    """A BERT in the shape of MiniLM, whose sizes are multiples of 64."""
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    ids = tokens(2, 7)
    return Case(seeded(lambda: transformers.BertModel(config, add_pooling_layer=False)).cuda(), {"input_ids": ids.cuda()})


TRITON = {aten._int_mm.default: int8_product, aten._weight_int4pack_mm.default: int4_product}
"""What replaces these in `eager` where Triton is installed."""


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose kernels there are for int8 and int4."""
    if request.param == "triton" and not has_kernels(torch.device("cuda")):
        pytest.skip("needs Triton: pip install lissom[triton]")
    if request.param == "pytorch":
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    return request.param


@pytest.mark.parametrize("backend", all_but_slow(["eager", "inductor"], "eager"))
@pytest.mark.parametrize(("kernels", "passes"), all_but_slow(PROGRAMS, *QUICK), indirect=["kernels"])
def test_a_quantized_encoder_is_what_its_simulation_is(passes: str, backend: str, kernels: str) -> None:
    device = torch.device("cuda")
    if "fp8" in passes and (capability(device) or (0, 0)) < (8, 9):
        pytest.skip("products of fp8 need compute capability 8.9")
    case = bert()
    simulated = lissom.optimize(case.model, case.inputs, passes=passes, data=[case.inputs]).program
    fast = lissom.compile(
        case.model, case.inputs, passes=passes, data=[case.inputs], backend=backend, goal=None
    )  # fmt: skip
    product = PRODUCTS[passes]
    if (kernels, backend) == ("triton", "eager"):
        product = TRITON.get(product, product)
    assert calls(fast.program, product) == count_kernels(fast.program) == LAYERS * LINEAR
    assert calls(fast.program, dequantize) == 0
    told = f"{LAYERS * LINEAR} of {LAYERS * LINEAR} quantized layers run in integers"
    assert any(told in note for note in fast.report.history.steps[-1].notes)
    same_as(simulated, case, fast, sizes=((1, 1), (3, 5), (16, 33)))


@pytest.mark.parametrize(("features", "inputs"), [(8, 32), (16, 64), (24, 128), (64, 384)])
def test_tiles_of_four_bits_hold_the_weight(features: int, inputs: int) -> None:
    q = torch.randint(-8, 8, (features, inputs), dtype=torch.int8).cuda()
    grid = torch.stack((torch.ones(inputs // 32, features), torch.zeros(inputs // 32, features)), -1).bfloat16().cuda()
    # Each row of the unit matrix picks one column of the weight, and whole numbers up to 8 are exact in bfloat16.
    found = aten._weight_int4pack_mm.default(torch.eye(inputs).bfloat16().cuda(), tiles(q), 32, grid)
    assert torch.equal(found.T.to(torch.int8), q)


@pytest.mark.parametrize("rows", [32, 33, 49, 161])
def test_sums_of_bytes_are_exact(rows: int) -> None:
    left, right = (torch.randint(-128, 128, (size, 384), dtype=torch.int8) for size in (rows, 1536))
    found = aten._int_mm.default(left.cuda(), right.cuda().T)
    assert torch.equal(found.cpu(), left.int() @ right.int().T)


def test_weights_of_eight_bits_are_measured_on_it() -> None:
    """Either a layer runs on `_weight_int8pack_mm`, or the history has both times."""
    case = bert()
    passes = "quantize{scheme=int8-weight}"
    fast = lissom.compile(case.model, case.inputs, passes=passes, simulate=True, goal=None)
    step = next(item for item in fast.report.history.steps if item.spelling.startswith("lower-quantized-products"))
    assert step.rewritten + len(step.skipped) == LAYERS * LINEAR
    assert all(skip.reason.startswith("with int8 weights it takes") for skip in step.skipped)
