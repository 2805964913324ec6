"""Tests of lissom.compiler.ir.node."""

import pytest
import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.node import Origin
from tests.support.models import captured

aten = torch.ops.aten


def test_an_origin_lists_each_pass_once_oldest_first():
    origin = Origin("layer.0").changed_by("first").changed_by("second").changed_by("first")
    assert origin.passes == ("first", "second")
    assert origin.module_path == "layer.0"


def test_a_node_with_nothing_recorded_has_an_empty_origin():
    assert nodes.origin(captured("feed_forward").placeholders[0]) == Origin()


def test_an_argument_is_found_by_name_in_any_position():
    program = captured("feed_forward")
    norm = program.nodes(aten.layer_norm.default)[0]
    assert nodes.argument(norm, "eps") == 1e-5
    assert nodes.argument(norm, "input") is program.placeholders[0]


def test_argument_left_out_is_default_of_schema():
    gelu = captured("feed_forward").nodes(aten.gelu.default)[0]
    assert nodes.argument(gelu, "approximate") == "none"


def test_an_argument_given_by_name_is_found():
    attention = captured("llama").nodes(aten.scaled_dot_product_attention.default)[0]
    assert nodes.argument(attention, "scale") == 0.5
    assert nodes.argument(attention, "is_causal") is False


def test_a_parameter_the_operator_lacks_is_a_key_error():
    gelu = captured("feed_forward").nodes(aten.gelu.default)[0]
    with pytest.raises(KeyError, match=r"aten\.gelu\.default has no parameter 'scale'"):
        nodes.argument(gelu, "scale")


def test_the_tensor_type_of_a_number_is_refused():
    size = captured("counter").nodes(aten.sym_size.int)[0]
    with pytest.raises(TypeError, match=r"sym_size_int_1 yields .* not a tensor"):
        nodes.tensor_type(size)


def test_only_nodes_that_yield_one_tensor_are_tensors():
    program = captured("counter")
    assert nodes.is_tensor(program.placeholders[0])
    assert not nodes.is_tensor(program.nodes(aten.sym_size.int)[0])
    assert not nodes.is_tensor(3)


def test_writing_buffer_is_state_write_and_nothing_else_is():
    program = captured("counter")
    assert [node.name for node in program.nodes() if nodes.is_state_write(node)] == ["copy__default"]


def test_pure_calls_change_nothing_and_are_not_random():
    program = captured("counter")
    with program.graph.inserting_before(program.output):
        noise = program.graph.call_function(aten.rand_like.default, (program.placeholders[0],))
    assert nodes.is_pure(program.nodes(aten.linear.default)[0])
    assert not nodes.is_pure(program.nodes(aten.copy_.default)[0])
    assert not nodes.is_pure(noise)
    assert not nodes.is_pure(program.placeholders[0])


def test_merged_origin_has_shared_path_and_last_line():
    program = captured("llama")
    linears = program.nodes(aten.linear.default)[:2]
    assert [nodes.origin(node).module_path for node in linears] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    merged = nodes.merged_origin(linears)
    assert merged.module_path == "model.layers.0.self_attn"
    assert merged.source == nodes.origin(linears[1]).source


def test_a_merged_origin_of_nothing_is_empty():
    assert nodes.merged_origin([]) == Origin()


def test_value_may_be_made_on_first_access():
    made = []

    def make():
        made.append(1)
        return torch.ones(2, 3)

    graph = fx.Graph()
    node = graph.placeholder("x")
    nodes.set_value(node, nodes.Deferred(nodes.type_of(torch.ones(2, 3)), make))
    assert nodes.is_tensor(node)
    assert nodes.tensor_type(node).shape == (2, 3)
    assert made == []
    other = fx.Graph().node_copy(node)
    assert nodes.value(node) is nodes.value(other)
    assert made == [1]
