"""Tests of quantized programs on ONNX Runtime: what runs in integers, and that it gives what the simulated program gives."""

from __future__ import annotations

import re

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lissom
from lissom.backends.onnx import integer_matmul
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.simulated_layers import simulated_layers
from lissom.compiler.verify.divergence import compare, run_samples, tolerance_of
from lissom.compiler.verify.rounding import SHARE
from lissom.compiler.verify.rounding_loss import rounding_loss
from lissom.errors import UnsupportedError
from tests.support import captures
from tests.support.models import normal, seeded, tiny_bert
from tools.zoo.catalogue import entries

PRUNED = "prune-heads{keep=0.5},prune-neurons{keep=0.5}"
DYNAMIC, TENSOR = "quantize{scheme=int8-dynamic}", "quantize{scheme=int8-dynamic,activations=tensor}"
STATIC, INT4 = "quantize{scheme=int8-static}", "quantize{scheme=int4-weight,group=16}"
ARCHITECTURES = {
    "masked/bert": STATIC,
    "masked/distilbert": DYNAMIC,
    "causal/gpt2": TENSOR,
    "causal/llama": DYNAMIC,
    "encoder-decoder/t5": DYNAMIC,
    "vision/vit": DYNAMIC,
    # Its head is its embedding table, which int4 takes along in int8: ONNX Runtime is fast in that with rounded activations.
    "causal/gemma": f"{INT4[:-1]},embeddings=false}}",
    "causal/qwen3": "quantize{scheme=int8-group}",
    "causal/phi": "quantize{scheme=int4-dynamic}",
    "causal/mistral": INT4,
    "causal/opt": DYNAMIC,
}
FAST = OnnxRuntime(timing_seconds=0)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [pytest.param(*item, marks=() if item[0] == "causal/llama" else pytest.mark.slow) for item in ARCHITECTURES.items()],
    ids=list(ARCHITECTURES),
)
def test_pruned_and_quantized_architectures_run_in_integers(name, scheme):
    case = next(entry for entry in entries() if entry.name == name).build()
    compiled = captures.compile(
        case.model, case.inputs, passes=f"{PRUNED},{scheme}", backend=FAST, checks="structural", data=[case.inputs]
    )
    program, steps = compiled.program, compiled.report.history.steps
    assert all(step.rewritten > 0 for step in steps if step.spelling == "eliminate-dead")
    count = len(simulated_layers(program))
    assert count >= 8
    (told,) = (note for note in steps[-1].notes if "quantized layers" in note)
    found = re.fullmatch(r"(\d+) of (\d+) quantized layers run in integers: (.*)", told)
    assert found, told
    products = {operator: int(number) for number, operator in re.findall(r"(\d+) (\w+)", found[3])}
    assert (int(found[1]), int(found[2]), sum(products.values())) == (count, count, count)
    few_bits = "int4" in scheme or "group" in scheme
    wanted_products = {"MatMulNBits"} if few_bits else {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    assert set(products) <= wanted_products
    example = program.signature.flatten(case.args, case.kwargs)
    sizes = {symbol: max(3, dimension.minimum) for symbol, dimension in program.signature.dimensions.items()}
    for sample in (example, program.signature.resize(example, sizes)):
        outputs = run_samples(program, [sample])
        loss = 0.0 if "int4-weight" in scheme else rounding_loss(program, [sample], outputs)
        error = compare(outputs, [list(compiled._executable(sample))]).relative_error
        assert error <= max(tolerance_of(program), SHARE * loss)


def compiled_bert(passes=DYNAMIC, **options):
    case = tiny_bert()
    return case, captures.compile(case.model, case.inputs, passes=passes, data=[case.inputs], checks="structural", **options)


@pytest.fixture(scope="module")
def fast_bert():
    """An encoder of two layers, and it compiled to products of integers."""
    return compiled_bert(backend=FAST)


def notes_of(compiled):
    return compiled.report.history.steps[-1].notes


def test_report_says_how_far_products_of_integers_are_off(fast_bert):
    _, compiled = fast_bert
    (told,) = (note for note in notes_of(compiled) if note.startswith("integer products differ"))
    # Sums of integers are exact, and scaled in float32.
    assert float(told.split()[-4]) < 1e-5


def test_it_is_saved_and_loaded_and_stays_small(fast_bert, tmp_path):
    case, compiled = fast_bert
    compiled.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")
    wanted, found = (list(model(**case.inputs).values()) for model in (compiled, loaded))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    model = onnx.load(next(tmp_path.rglob("model.onnx")))
    kept = {item.name: item.data_type for item in model.graph.initializer}
    matrices = {name: dtype for name, dtype in kept.items() if "_integers" in name}
    assert len(matrices) == 12
    assert set(matrices.values()) == {onnx.TensorProto.INT8}


def test_the_file_runs_in_a_plain_session(fast_bert, tmp_path):
    case, compiled = fast_bert
    compiled.save(tmp_path / "saved")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(next(tmp_path.rglob("model.onnx")), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in case.inputs.items()})
    for a, b in zip(compiled(**case.inputs).values(), found, strict=True):
        # The same operators on the same machine.
        torch.testing.assert_close(torch.from_numpy(b), a, rtol=1e-5, atol=1e-6)


def test_int8_weights_are_multiplied_where_activations_may_be_rounded():
    _, compiled = compiled_bert("quantize{scheme=int8-weight}", backend=OnnxRuntime(timing_seconds=0, accuracy_level=4))
    assert "12 of 12 quantized layers run in integers: 12 MatMulNBits" in notes_of(compiled)
    assert any(note.startswith("accuracy_level=4 changes the outputs by ") for note in notes_of(compiled))


def test_scheme_without_kernel_is_refused_and_simulated_where_asked():
    refusal = (
        "backend 'onnxruntime' has no kernel for 12 quantized layers, first 'encoder.layer.0.attention.self.query' with fp8 "
        "weights on fp8 activations: ONNX Runtime has no products of fp8 on a CPU; choose another scheme"
    )
    with pytest.raises(UnsupportedError, match=re.escape(refusal)):
        compiled_bert("quantize{scheme=fp8}", backend=FAST)
    case, compiled = compiled_bert("quantize{scheme=fp8}", backend=FAST, simulate=True)
    told = "0 of 12 quantized layers run in integers; 12 in floating point on quantized values"
    assert any(note.startswith(told) for note in notes_of(compiled))
    sample = compiled.program.signature.flatten((), case.inputs)
    wanted = run_samples(compiled.program, [sample])
    allowed = max(tolerance_of(compiled.program), SHARE * rounding_loss(compiled.program, [sample], wanted))
    assert compare(wanted, [list(compiled._executable(sample))]).relative_error <= allowed


def test_wrong_kernels_are_found_before_they_are_used(monkeypatch):
    right = integer_matmul._with_rows
    monkeypatch.setattr(integer_matmul, "_with_rows", lambda stored, rows: right(stored, rows) // 2)
    model = seeded(lambda: nn.Linear(192, 8))
    with pytest.raises(
        UnsupportedError, match=r"its integer kernels fail here or are wrong: .*an integer product has a relative error of"
    ):
        captures.compile(model, normal(2, 3, 192), passes="quantize{lm_head=true}", backend=FAST)
