"""Tests of fold-quantized-weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.ops.quantization import dequantize, fake_quantize
from tests.support import captures
from tests.support.harness import check_golden, rewrite
from tests.support.models import tiny_bert, tiny_gpt2

aten = torch.ops.aten
PASSES = {
    "int8": "quantize{scheme=int8-weight,embeddings=true}",
    "int4": "quantize{scheme=int4-weight,group=8,symmetric=true,embeddings=true}",
    "uint4": "quantize{scheme=int4-weight,group=8,symmetric=false,embeddings=true}",
    "tensor": "quantize{scheme=int8-weight,granularity=tensor,embeddings=true}",
    "fp8": "quantize{scheme=fp8}",
    "nvfp4": "quantize{scheme=nvfp4-weight,embeddings=true}",
    "dynamic": "quantize",
}


def test_golden() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    _, history = rewrite("quantize{scheme=int8-weight},fold-quantized-weights", module, torch.randn(2, 3, 8))
    check_golden("fold_quantized_weights", history.diff(1, 2))


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_answers_are_same_bit_for_bit_and_program_smaller(make: type, passes: str) -> None:
    case = make()
    before = captures.optimize(case.model, case.inputs, passes=passes).program
    after = captures.optimize(case.model, case.inputs, passes=f"{passes},fold-quantized-weights").program
    assert not any(node.args[0].op == "get_attr" for node in after.nodes(fake_quantize))
    assert after.nodes(dequantize)
    assert after.parameter_bytes < before.parameter_bytes
    sample = before.signature.flatten(case.args, case.kwargs)
    with torch.no_grad():
        for wanted, found in zip(before.run(sample), after.run(sample), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_table_is_looked_up_before_it_is_turned_back() -> None:
    case = tiny_gpt2()
    passes = "quantize{scheme=int4-weight,group=8,embeddings=true},fold-quantized-weights"
    program = captures.optimize(case.model, case.inputs, passes=passes).program
    tables = [node for node in program.nodes(aten.embedding.default) if node.args[0].op == "get_attr"]
    assert len(tables) == len(program.nodes(aten.embedding.default))
    assert any(program.weight(str(node.args[0].target)).dtype == torch.uint8 for node in tables)


def test_it_cannot_be_trained_except_unquantized_weights() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs, passes="quantize,fold-quantized-weights").program.own_copy()
    sample = program.signature.flatten((), case.kwargs)
    total = sum(item.float().square().sum() for item in program.run(sample) if isinstance(item, torch.Tensor))
    total.backward()
    norm = next(name for name in program.weights() if name.endswith("LayerNorm.weight"))
    assert program.weight(norm).grad is not None
