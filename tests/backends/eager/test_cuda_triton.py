"""Quantized models on a CUDA device with Triton's kernels, beside the same models on the CPU, saved and loaded.

On the pretended GPU the kernels are their references; tests/ops/triton_kernels runs compiled programs in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch

import lissom
from lissom.backends.simulated_layers import count_kernels
from lissom.ops import int4_product, int8_product, quantize_rows, triton_kernels
from lissom.ops.quantization import dequantize, fake_quantize_dynamic
from tests.support.cuda_models import BF16, LAYERS, LINEAR, MODELS, bert, on_cuda, same_as
from tests.support.harness import aten, calls
from tests.support.neighbours import all_but_slow

pytestmark = [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton(gpu: None) -> None:
    if not triton_kernels.has_kernels(torch.device("cuda")):
        pytest.skip("needs Triton: pip install lissom[triton]")


NORMS = {"bert": 4, "llama": 4}
"""The inputs of linear layers in a layer: of q, k and v, of the output, of the feed-forward and of its last layer."""
SCHEMES = {
    "quantize": int8_product,
    "quantize{activations=tensor}": int8_product,
    "quantize{scheme=int8-static}": int8_product,
    f"{BF16}quantize": int8_product,
    f"{BF16}quantize{{scheme=int4-weight,group=4,symmetric=true}}": int4_product,
    f"{BF16}quantize{{scheme=int4-weight,group=4,symmetric=false}}": int4_product,
    f"{BF16}quantize{{scheme=int4-weight,granularity=channel}}": int4_product,
}
FEW = ("quantize", "quantize{scheme=int8-static}", f"{BF16}quantize{{scheme=int4-weight,group=4,symmetric=false}}")


QUICK = [("llama", "quantize"), ("bert", "quantize{scheme=int8-static}")]
PROGRAMS = [*(("llama", passes) for passes in SCHEMES), *(("bert", passes) for passes in FEW)]


@pytest.mark.parametrize(("name", "passes"), all_but_slow(PROGRAMS, *QUICK))
def test_a_model_on_the_device_is_its_simulation_on_the_cpu(name: str, passes: str, tmp_path: Path) -> None:
    case = MODELS[name]()
    on_device = on_cuda(case)
    simulated = lissom.optimize(case.model, case.inputs, passes=passes, data=[case.inputs]).program
    model = copy.deepcopy(case.model).cuda()
    fast = lissom.compile(model, on_device, passes=passes, data=[on_device], goal=None)
    assert calls(fast.program, SCHEMES[passes]) == count_kernels(fast.program) == LAYERS * LINEAR[name]
    assert calls(fast.program, dequantize, fake_quantize_dynamic) == 0
    fast.save(tmp_path / "saved")
    for run in (fast, lissom.load(tmp_path / "saved")):
        same_as(simulated, case, run)


@pytest.mark.parametrize("name", MODELS)
def test_int8_kernels_a_layer(name: str) -> None:
    """One kernel for each quantized input and one product for each layer; their biases and epilogues are in the products."""
    case = MODELS[name]()
    inputs = on_cuda(case)
    fast = lissom.compile(case.model.cuda(), inputs, passes="quantize", goal=None)
    found = Counter(node.target for node in fast.program.nodes())
    assert found[quantize_rows] == LAYERS * NORMS[name]
    assert found[int8_product] == LAYERS * LINEAR[name]
    options = [node.kwargs for node in fast.program.nodes(int8_product)]
    activation = {"bert": "gelu", "llama": "silu"}[name]
    assert sum(given.get("activation") == activation for given in options) == LAYERS
    assert sum(given.get("combine") == "add" for given in options) == 2 * LAYERS  # the residual adds
    assert found[aten.gelu.default] + found[aten.silu.default] + found[aten.aminmax.default] + found[aten._int_mm.default] == 0


def test_without_triton_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    case = bert()
    inputs = on_cuda(case)
    fast = lissom.compile(case.model.cuda(), inputs, passes="quantize", goal=None, simulate=True)
    notes = [note for step in fast.report.history.steps for note in step.notes]
    assert any("without Triton's kernels: Triton is not installed" in note for note in notes), notes


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert triton_kernels.obstacle(torch.device("cuda")) == "Triton needs a C compiler, and there is no gcc or clang"
