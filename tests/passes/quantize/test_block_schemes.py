"""Tests of the schemes of quantize in block formats: mxfp4-weight, mxfp8-weight, nvfp4-weight."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.analysis.structure.matrix import RoundedMatrix, rounded_matrix_of
from lissom.compiler.ir.program import Program
from lissom.errors import UnsupportedError
from lissom.ops.block_formats import BLOCK_FORMATS, block_scale
from lissom.ops.quantization import dequantize, fake_quantize
from lissom.ops.weight_quantized_linear import weight_quantized_linear
from lissom.passes.quantize.quantize import Quantize
from tests.ops.test_block_formats import oracle
from tests.support import captures
from tests.support.gguf_models import decoder
from tests.support.harness import rewrite
from tests.support.mixtures import EXPERTS, mixture, samples, stacked_products
from tests.support.models import FeedForward, normal, seeded, tiny_gpt2, tiny_llama

aten = torch.ops.aten
SCHEMES = {"mxfp4": 0.85, "mxfp8": 0.985, "nvfp4": 0.9}
"""By format, the least cosine of logits with those of the original, for random weights, whose errors add up over the layers."""
BITS = {"mxfp4": 4 + 8 / 32, "mxfp8": 8 + 8 / 32, "nvfp4": 4 + 8 / 16}


def passes_of(form: str, options: str = "") -> str:
    return f"quantize{{scheme={form}-weight{options}}}"


def matrices(program: Program) -> list[RoundedMatrix]:
    found = [rounded_matrix_of(node) for node in program.nodes(aten.linear.default, aten.addmm.default)]
    return [matrix for matrix in found if isinstance(matrix, RoundedMatrix)]


def test_rewrites() -> None:
    module = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    _, history = rewrite("quantize{scheme=nvfp4-weight},fold-quantized-weights", module, torch.randn(2, 3, 32))
    # The scale of the tensor depends on the random weights.
    text = re.sub(r"tensor_scale=[0-9.e-]+", "tensor_scale=…", history.diff(0, 2))
    lines = [line for line in text.splitlines() if line[:1] in "-+"]
    call = "lissom.dequantize(@0.weight_fp4, @0.weight_scale, format='fp4', tensor_scale=…, dtype=f32)"
    assert [line for line in lines if "@0.weight" in line or "%dequantize:" in line] == [
        "-  weight @0.weight: f32[16, 32]",
        "+  weight @0.weight_fp4: u8[16, 16]",
        "+  weight @0.weight_scale: f8e4m3[16, 2]",
        "-  %linear: f32[batch, sequence, 16] = aten.linear(%input_1, @0.weight, @0.bias)  # 0",
        f"+  %dequantize: f32[16, 32] = {call}",
    ]


@pytest.mark.parametrize("form", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_numbers(family: str, form: str) -> None:
    model, ids = decoder(family, 140, layers=2), torch.arange(3, 15).view(2, 6)
    found = captures.optimize(model, {"input_ids": ids}, passes=passes_of(form))
    step = found.report.history.steps[-1]
    assert step.cosine is not None and SCHEMES[form] < step.cosine < 1
    weights, block = dict(model.named_parameters()), BLOCK_FORMATS[form]
    blocks = [matrix for matrix in matrices(found.program) if matrix.quantizer.kwargs["format"] == block.element.name]
    assert len(blocks) == 14
    matrix = blocks[3]
    given = [found.program.weight(str(node.target)) for node in matrix.quantizer.all_input_nodes]
    rounded, weight = fake_quantize(*given, **matrix.quantizer.kwargs).double(), weights[matrix.name].detach().double()
    tensor_scale = float(matrix.quantizer.kwargs.get("tensor_scale", 1.0))
    for row, values in zip(weight[:4], rounded[:4], strict=True):
        for start in range(0, len(row), block.size):
            span = slice(start, start + block.size)
            scale, elements = oracle(row[span].tolist(), block, tensor_scale)
            # The product of two scales is rounded to float32, and that of it with an element.
            wanted = torch.tensor(elements, dtype=torch.float64) * scale * tensor_scale
            torch.testing.assert_close(values[span], wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("form", SCHEMES)
def test_weights_take_as_many_bits_as_the_format(form: str) -> None:
    module, x = seeded(lambda: FeedForward(64, 128)), normal(2, 5, 64)
    program = captures.optimize(module, x, passes=f"{passes_of(form, ',lm_head=true')},fold-quantized-weights").program
    stored = [program.weight(str(node.target)) for call in program.nodes(dequantize) for node in call.all_input_nodes]
    assert sum(8 * tensor.nbytes for tensor in stored) == BITS[form] * 2 * 64 * 128


@pytest.mark.parametrize("form", SCHEMES)
def test_composes(form: str, tmp_path: Path) -> None:
    module, x = seeded(lambda: FeedForward(64, 128)), normal(2, 5, 64)
    passes = passes_of(form, ",lm_head=true")
    wanted = captures.optimize(module, x, passes=passes).program.run([x])[0]
    compiled = captures.compile(module, x, passes=passes, goal=None)
    if compiled.program.nodes(weight_quantized_linear):
        assert len(compiled.program.nodes(weight_quantized_linear)) == 2
    # Sums of 128 products in another order.
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)
    compiled.save(tmp_path / "saved")
    assert torch.equal(lissom.load(tmp_path / "saved")(x), compiled(x))
    passes = f"cast{{dtype=bf16}},{passes}"
    wanted = captures.optimize(module, x, passes=passes).program.run([x])[0]
    # bfloat16 has 8 bits, and values are up to 4.
    torch.testing.assert_close(captures.compile(module, x, passes=passes, goal=None)(x), wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("form", SCHEMES)
def test_gptq_lowers_the_error_and_keeps_the_scales(form: str) -> None:
    module, x = seeded(lambda: FeedForward(64, 128)), normal(64, 5, 64) @ normal(64, 64, seed=1) / 8
    passes = passes_of(form, ",lm_head=true")
    nearest = captures.optimize(module, x, passes=passes).program
    found = captures.optimize(module, x, passes=f"{passes},gptq", data=[x]).program
    wanted = module(x)
    errors = [float((program.run([x])[0] - wanted).detach().norm()) for program in (nearest, found)]  # pyright: ignore
    assert errors[1] < 0.8 * errors[0]
    for before, after in zip(matrices(nearest), matrices(found), strict=True):
        assert torch.equal(before.read_scale(nearest)[0], after.read_scale(found)[0])
        operands = [found.weight(str(node.target)) for node in after.quantizer.all_input_nodes]
        # Weights are on the grid.
        assert torch.equal(fake_quantize(*operands, **after.quantizer.kwargs), operands[0])
    sentence = "gptq{rescale=mse} chooses scales in floating point, and 'linear' (aten.linear, in up"
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        captures.optimize(module, x, passes=f"{passes},gptq{{rescale=mse,act_order=false}}", data=[x])


def test_training_changes_weights_and_not_scales() -> None:
    module, x = seeded(lambda: FeedForward(64, 128)), normal(4, 5, 64)
    passes = passes_of("nvfp4", ",lm_head=true")
    before = captures.optimize(module, x, passes=passes).program
    after = captures.optimize(module, x, passes=f"{passes},distill{{steps=3}}", data=[x]).program
    for old, new in zip(matrices(before), matrices(after), strict=True):
        assert torch.equal(old.read_scale(before)[0], new.read_scale(after)[0])
        assert not torch.equal(before.weight(old.name), after.weight(new.name))


def test_tied_table_is_in_int8() -> None:
    case = tiny_gpt2()
    program = captures.optimize(case.model, case.inputs, passes=passes_of("nvfp4")).program
    assert {str(node.kwargs["format"]) for node in program.nodes(fake_quantize)} == {"fp4"}
    model = decoder("gemma3_text", 140, layers=1)
    found = captures.optimize(model, {"input_ids": torch.arange(6)[None]}, passes=passes_of("mxfp4")).program
    formats = {str(node.args[0].target): str(node.kwargs["format"]) for node in found.nodes(fake_quantize)}
    tied = [name for name in formats if "embed" in name or "lm_head" in name]
    assert {formats.pop(name) for name in tied} == {"int8"}
    assert set(formats.values()) == {"fp4"}


@pytest.mark.parametrize("form", SCHEMES)
def test_each_expert_has_scales_of_its_own(form: str) -> None:
    found = captures.optimize(mixture("mixtral"), samples(1)[0], passes=passes_of(form), checks="structural").program
    given = [rounded_matrix_of(node, stacks=True) for node in stacked_products(found)]
    assert len(given) == 2
    for matrix in given:
        assert isinstance(matrix, RoundedMatrix)
        rows, columns = matrix.shape
        assert matrix.read_scale(found)[0].shape == (EXPERTS, rows, columns // BLOCK_FORMATS[form].size)


def test_transposed_weights_share_scales_along_their_inputs() -> None:
    case = tiny_gpt2()
    program = captures.optimize(case.model, case.inputs, passes=passes_of("nvfp4")).program
    transposed = [matrix for matrix in matrices(program) if matrix.transposed]
    assert transposed
    for matrix in transposed:
        weight = matrix.read(program)
        wanted, tensor_scale = block_scale(weight, (len(weight), weight.shape[1] // 16), BLOCK_FORMATS["nvfp4"])
        assert torch.equal(matrix.read_scale(program)[0], wanted.float() * tensor_scale)


def test_widths_that_are_no_whole_blocks_are_left() -> None:
    case = tiny_llama()
    found = captures.optimize(case.model, case.inputs, passes=passes_of("mxfp4"))
    reasons = {skip.reason for skip in found.report.history.steps[-1].skipped}
    assert "its 16 input features are no multiple of 32, the block size of mxfp4" in reasons
    taken = {scheme for site in Quantize.sites(found.program) for schemes in site.takes.values() for scheme in schemes}
    assert "nvfp4-weight" in taken and "mxfp4-weight" not in taken


@pytest.mark.parametrize("option", ["granularity=channel", "group=8", "symmetric=false", "weight_observer=mse"])
def test_requirements(option: str) -> None:
    sentence = (
        "quantize{scheme=nvfp4-weight} scales blocks of 16 by their largest value and has no zero points: leave out "
        f"{option.partition('=')[0]}="
    )
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        Quantize(**{name: value for name, value in [_parsed(option)]}, scheme="nvfp4-weight")  # pyright: ignore


def _parsed(option: str) -> tuple[str, object]:
    name, _, value = option.partition("=")
    return name, int(value) if value.isdigit() else False if value == "false" else value


@pytest.mark.parametrize(("form", "scales"), [("mxfp4", "fp4 with scales in f8e8m0"), ("nvfp4", "fp4 with scales in f8e4m3")])
def test_onnx_runtime_refuses_it(form: str, scales: str) -> None:
    pytest.importorskip("onnxruntime")
    module, x = seeded(lambda: FeedForward(64, 128)), normal(2, 5, 64)
    sentence = f"ONNX Runtime has no kernel on a CPU for 'up.weight' of FeedForward, a weight in {scales}; choose"
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        captures.compile(module, x, passes=passes_of(form, ",lm_head=true"), backend="onnxruntime")
