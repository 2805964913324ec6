"""Tests of lissom.compiler.ir.fake."""

import logging

import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.types import ScalarType, TensorType
from lissom.frontends.capture.export import capture
from tests.support.models import captured, normal

CPU = torch.device("cpu")


def test_call_is_typed_from_types_of_its_arguments():
    program = captured("feed_forward")
    linear = program.nodes(torch.ops.aten.linear.default)[0]
    typed = nodes.type_of(fake.fake_call(program.fake_mode, linear))
    assert fake.same_type(program.fake_mode, typed, nodes.node_type(linear))


def test_known_call_has_type_of_new_one():
    program = captured("bert")
    for node in program.nodes():
        fresh = fake.description(fake.fake_call(program.fake_mode, node))
        assert fake.description(fake.known_call(program.fake_mode, node)) == fresh
        assert fake.description(fake.known_call(program.fake_mode, node)) == fresh


def test_a_known_call_is_told_by_its_arguments():
    program = captured("feed_forward")
    linear = program.nodes(torch.ops.aten.linear.default)[0]
    known = fake.known_call(program.fake_mode, linear)
    assert fake.known_call(program.fake_mode, linear) is known
    with program.graph.inserting_after(linear):
        calls = [program.graph.call_function(torch.ops.aten.add.Scalar, (linear, number)) for number in (1, 1.0, True)]
        product = program.graph.call_function(torch.ops.aten.to.dtype, (linear, torch.int64))
    nodes.set_value(product, fake.known_call(program.fake_mode, product))
    values = [fake.known_call(program.fake_mode, call) for call in calls]
    assert len({id(value) for value in values}) == 3
    for call, dtype in zip(calls, (torch.int64, torch.float32, torch.int64), strict=True):
        call.args = (product, call.args[1])
        assert fake.known_call(program.fake_mode, call).dtype == dtype


def test_sizes_that_depend_on_values_are_never_shared():
    program = captured("feed_forward")
    norm = program.nodes(torch.ops.aten.layer_norm.default)[0]
    with program.graph.inserting_after(norm):
        found = [program.graph.call_function(torch.ops.aten.nonzero.default, (read,)) for read in (norm, norm.args[0])]
    first, second = (nodes.type_of(fake.known_call(program.fake_mode, call)) for call in found)
    assert first.shape[0] != second.shape[0]


def test_typing_does_not_fix_a_size():
    program = captured("feed_forward")
    before = len(program.fake_mode.shape_env.guards)
    for node in program.nodes():
        fake.fake_call(program.fake_mode, node)
    assert len(program.fake_mode.shape_env.guards) == before


def test_a_fake_weight_has_fixed_sizes_and_no_memory():
    program = captured("feed_forward")
    typed = fake.fake_weight(program.fake_mode, torch.zeros(3, 4, dtype=torch.int8))
    assert nodes.type_of(typed) == TensorType(torch.int8, (3, 4), CPU)


def test_equal_expressions_are_the_same_size():
    program = captured("feed_forward")
    batch, sequence, _ = nodes.tensor_type(program.placeholders[0]).shape
    left = TensorType(torch.float32, (batch * (sequence + 1),), CPU)
    right = TensorType(torch.float32, (batch * sequence + batch,), CPU)
    assert fake.same_type(program.fake_mode, left, right)
    assert not fake.same_type(program.fake_mode, left, TensorType(torch.float32, (batch * sequence,), CPU))


def test_quotients_without_a_rest_are_the_same_size():
    program = captured("feed_forward")
    batch, sequence, _ = nodes.tensor_type(program.placeholders[0]).shape
    half = FloorDiv(sequence, 2)
    windows = TensorType(torch.float32, (batch, FloorDiv(batch * half**2, half)), CPU)
    assert fake.same_type(program.fake_mode, windows, TensorType(torch.float32, (batch, batch * half), CPU))
    for other in (sequence, batch * half**2, FloorDiv(half + 1, 2)):
        assert not fake.same_type(program.fake_mode, windows, TensorType(torch.float32, (batch, other), CPU))


def test_types_of_another_dtype_rank_kind_or_length_differ():
    one = TensorType(torch.float32, (2,), CPU)
    assert not fake.same_type(None, one, TensorType(torch.float16, (2,), CPU))
    assert not fake.same_type(None, one, TensorType(torch.float32, (2, 1), CPU))
    assert not fake.same_type(None, one, None)
    assert not fake.same_type(None, (one,), (one, one))
    assert not fake.same_type(None, ScalarType(int, 1), ScalarType(bool, True))
    assert fake.same_type(None, (one, None), (one, None))


def test_a_hint_is_the_size_of_the_example():
    batch, sequence, width = nodes.value(captured("feed_forward").placeholders[0]).shape
    assert [fake.hint(size) for size in (batch, sequence, width)] == [2, 5, 8]


class Scores(nn.Module):
    """Scores with a bias for each pair, as MultiheadAttention computes them where it returns its weights."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(bias, x, x.mT)


def test_operators_decomposed_for_symbolic_sizes_are_typed_quietly(caplog):
    program = capture(Scores(), (normal(2, 3, 4), normal(2, 3, 3))).program
    (node,) = program.nodes(torch.ops.aten.baddbmm.default)
    typed = nodes.type_of(fake.fake_call(program.fake_mode, node))
    assert fake.same_type(program.fake_mode, typed, nodes.node_type(node))
    # PyTorch logged a traceback.
    assert [found.message for found in caplog.records if found.levelno >= logging.WARNING] == []
