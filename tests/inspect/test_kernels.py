"""Tests of lissom.inspect.kernels: the kernels, names and shapes of operators in lowered programs."""

import pytest
import torch
from torch import nn

from lissom import ops
from lissom.compiler.ir.program import Program
from lissom.inspect.kernels import Kernel, kernel_of, module_pattern, operator_name, shape_of
from lissom.ops.native import instructions_for, load_kernels
from tests.passes.prune.pack_tokens.test_pack_tokens import Encoder, inputs
from tests.support import captures
from tests.support.models import FeedForward, captured, normal, seeded, tiny_bert

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def kernels():
    if load_kernels():
        pytest.skip(load_kernels())


def compiled(model: nn.Module, inputs: object, **options: object) -> Program:
    return captures.compile(model.eval(), inputs, checks="off", **options).program


def linear_program(**options: object) -> Program:
    return compiled(nn.Linear(64, 96), normal(6, 5, 64), **options)


def test_operators_are_named_shortly_and_products_with_their_module():
    names = [operator_name(node) for node in captured("bert").nodes()]
    assert "layer_norm" in names
    assert "linear in encoder.layer.*.attention.output.dense" in names


def test_kernel_of_ours_has_its_instruction_set_and_numbers():
    (node,) = linear_program().nodes()
    found = kernel_of(node)
    assert found == Kernel("Lissom", "packed_linear", f"{instructions_for(torch.float32)}, float32")
    assert str(found).startswith("Lissom packed_linear, ")


@pytest.mark.parametrize(
    ("passes", "details"),
    [
        ("quantize", "int8"),
        ("quantize{scheme=int8-weight}", "int8 weights, float32"),
        ("quantize{scheme=int4-weight}", "uint4 weights, float32"),
        ("quantize{scheme=int8-group}", "int8"),
        ("quantize{scheme=int4-dynamic}", "int4 weights, int8"),
    ],
)
def test_quantized_layers_name_their_formats(passes, details):
    if not (torch.ops.lissom.has_int8() and torch.ops.lissom.has_weight_quantized()):
        pytest.skip("this processor lacks AVX2")
    program = compiled(FeedForward(64, 128), normal(2, 5, 64), passes=passes)
    found = [kernel_of(node) for node in program.nodes() if "quantized_linear" in operator_name(node)]
    by_tiles = details.endswith("int8") and passes == "quantize"
    multiplied = torch.int8 if by_tiles else torch.float32
    assert {kernel.details for kernel in found} == {f"{instructions_for(multiplied)}, {details}"}


def test_bfloat16_is_widened_where_the_processor_multiplies_it_slowly(monkeypatch):
    (node,) = compiled(nn.Linear(64, 96).bfloat16(), normal(6, 5, 64).bfloat16()).nodes()
    for multiplies, numbers in ((True, "bfloat16"), (False, "bfloat16 widened to float32")):
        monkeypatch.setattr("lissom.inspect.kernels.multiplies_bfloat16", lambda found=multiplies: found)
        assert kernel_of(node).details.endswith(f", {numbers}")


def test_pytorchs_operators_have_their_dtype():
    (node, *_) = captured("feed_forward").nodes(aten.linear.default)
    assert str(kernel_of(node)) == "PyTorch linear, float32"
    assert str(kernel_of(node, measured=True)) == "PyTorch linear, float32, measured faster"


def test_operators_of_ours_without_a_kernel_run_in_pytorch(monkeypatch):
    (node,) = linear_program().nodes()
    monkeypatch.setattr("lissom.inspect.kernels.load_kernels", lambda: "there is no compiler")
    assert str(kernel_of(node)) == "Lissom packed_linear, by PyTorch's operators, float32"


def test_shapes_of_linear_layers_have_rows_inputs_and_features():
    program = linear_program()
    (node,) = program.nodes()
    assert shape_of(node, program.signature.sizes_of([normal(6, 5, 64)])) == "30 × 64 → 96"
    assert shape_of(node, program.signature.sizes_of([normal(2, 7, 64)])) == "14 × 64 → 96"
    assert shape_of(node, {}) == "? × 64 → 96"


def test_shapes_of_attentions_have_heads_and_tokens():
    case = tiny_bert()
    for program in (captured("bert"), compiled(case.model, case.inputs)):
        tensors = program.signature.flatten(case.args, case.kwargs)
        sizes = program.signature.sizes_of(tensors)
        batch, tokens = tensors[0].shape
        heads, head_dim = case.model.config.num_attention_heads, case.model.config.hidden_size
        expected = f"{heads} heads × {head_dim // heads}, {batch} × {tokens} tokens"
        assert [shape_of(node, sizes) for node in program.nodes()].count(expected) == case.model.config.num_hidden_layers


def test_attention_without_padding_has_sizes_of_padded_texts():
    program = compiled(seeded(Encoder), inputs(), passes="pack-tokens")
    (first, second) = program.nodes(ops.unpadded_attention)
    sizes = program.signature.sizes_of(list(inputs(3, 7)))
    assert shape_of(first, sizes) == shape_of(second, sizes) == "2 heads × 4, 3 × 7 tokens, unpadded"


def test_other_operators_have_the_sizes_of_their_output():
    program = captured("feed_forward")
    (node, *_) = program.nodes(aten.gelu.default)
    assert shape_of(node, program.signature.sizes_of([normal(2, 5, 8)])) == "2 × 5 × 12"


def test_numbers_of_layers_are_left_out_of_patterns():
    assert "encoder.layer.*.attention.output.dense" in map(module_pattern, captured("bert").nodes())
