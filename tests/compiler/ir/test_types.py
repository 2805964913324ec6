"""Tests of lissom.compiler.ir.types."""

import pytest
import sympy
import torch

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.types import ScalarType, TensorType, format_type, short_dtype, size_of, type_of
from tests.support.models import captured


def named(expression):
    return str(expression)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.int64, "i64"), (torch.bool, "bool"), (torch.uint16, "uint16")],
)
def test_a_dtype_has_a_short_name(dtype, text):
    assert short_dtype(dtype) == text


def test_type_of_tensor_is_its_dtype_sizes_and_device():
    found = type_of(torch.zeros(2, 3, dtype=torch.float16))
    assert found == TensorType(torch.float16, (2, 3), torch.device("cpu"))
    assert found.rank == 2


def test_a_flag_is_a_bool_and_not_an_integer():
    assert type_of(True) == ScalarType(bool, True)
    assert type_of(1) == ScalarType(int, 1)
    assert type_of(0.5) == ScalarType(float, 0.5)


def test_nothing_and_nests_have_types():
    assert type_of(None) is None
    assert type_of([1, (2.0, None)]) == (ScalarType(int, 1), (ScalarType(float, 2.0), None))


def test_a_value_a_program_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a program's values are tensors, numbers and tuples of these, not str"):
        type_of("text")


def test_symbolic_size_is_expression_and_fixed_one_number():
    program = captured("feed_forward")
    batch, _, width = nodes.value(program.placeholders[0]).shape
    assert isinstance(size_of(batch), sympy.Symbol)
    assert size_of(width) == 8
    assert isinstance(size_of(width), int)


def test_symbolic_size_read_at_runtime_is_a_number():
    program = captured("counter")
    size = program.nodes(torch.ops.aten.sym_size.int)[0]
    assert format_type(nodes.node_type(size), program.signature.name_of) == "int batch"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros((), dtype=torch.int8), "i8[]"),
        (torch.zeros(4, device="meta"), "f32[4]@meta"),
        (7, "int 7"),
        (True, "bool True"),
        ((torch.zeros(4), torch.zeros(4, dtype=torch.long)), "(f32[4], i64[4])"),
    ],
)
def test_types_read_as_text(value, text):
    assert format_type(type_of(value), named) == text


def test_expressions_are_printed_with_the_names_given():
    size = sympy.Symbol("s0") * 2
    assert format_type(TensorType(torch.float32, (size, 8), torch.device("cpu")), named) == "f32[2*s0, 8]"
