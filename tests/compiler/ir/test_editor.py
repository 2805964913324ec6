"""Tests of lissom.compiler.ir.editor."""

import pytest
import torch
from torch import fx, nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.verify.structure import verify_structure
from lissom.errors import PassError
from lissom.frontends.capture.export import capture
from tests.support.models import captured, feed_forward, normal

aten = torch.ops.aten


def editor(name: str = "feed_forward") -> Editor:
    return Editor(captured(name), "test-pass")


def only(program: Program, target: object) -> fx.Node:
    return program.nodes(target)[0]


def test_a_new_call_is_typed_and_stamped():
    edit = editor()
    gelu = only(edit.program, aten.gelu.default)
    with edit.before(gelu):
        relu = edit.call(aten.relu.default, gelu.args[0])
    assert nodes.node_type(relu) == nodes.node_type(gelu)
    assert nodes.origin(relu).passes == ("test-pass",)
    assert nodes.origin(relu).source == nodes.origin(gelu).source
    assert [node.name for node in edit.program.nodes()][1:4] == ["linear", "relu", "gelu"]


def test_call_that_stands_for_several_has_path_they_share():
    edit = editor("llama")
    first, second = edit.program.nodes(aten.linear.default)[:2]
    with edit.before(second, like=[first, second]):
        made = edit.call(aten.neg.default, first)
    assert nodes.origin(made).module_path == "model.layers.0.self_attn"


def test_call_operator_refuses_names_pass_operator_and_arguments():
    edit = editor()
    gelu = only(edit.program, aten.gelu.default)
    with (
        edit.before(gelu),
        pytest.raises(PassError, match=r"^test-pass: aten.mm does not accept the arguments \[%x, %linear\]: "),
    ):
        edit.call(aten.mm.default, edit.program.placeholders[0], gelu.args[0])


def test_every_edit_is_counted():
    edit = editor()
    gelu = only(edit.program, aten.gelu.default)
    assert edit.program.edits == 0
    with edit.before(gelu):
        relu = edit.call(aten.relu.default, gelu.args[0])
    after_call = edit.program.edits
    edit.replace(gelu, relu)
    assert 0 < after_call < edit.program.edits


def test_replacing_moves_readers_erases_old_and_remembers_its_name():
    edit = editor()
    gelu = only(edit.program, aten.gelu.default)
    down = edit.program.nodes(aten.linear.default)[1]
    with edit.before(gelu):
        relu = edit.call(aten.relu.default, gelu.args[0])
    edit.replace(gelu, relu)
    assert down.args[0] is relu
    assert gelu._erased
    assert nodes.origin(relu).replaces == "gelu"
    assert edit.rewritten == 1
    verify_structure(edit.program)


def test_replacing_by_node_of_another_origin_leaves_that_origin():
    edit = editor()
    dropout = only(edit.program, aten.dropout.default)
    source = dropout.args[0]
    edit.replace(dropout, source)
    assert nodes.origin(source).replaces == ""
    assert nodes.origin(source).passes == ()


def test_replacing_by_another_type_is_refused():
    edit = editor()
    gelu = only(edit.program, aten.gelu.default)
    with pytest.raises(PassError) as caught:
        edit.replace(gelu, edit.program.placeholders[0])
    source = nodes.origin(gelu).source
    assert str(caught.value).splitlines()[0] == (
        f"test-pass: 'gelu' (aten.gelu, {source}) yields f32[batch, sequence, 12], but its replacement 'x' (placeholder) "
        f"yields f32[batch, sequence, 8]; a replacement must have the same type"
    )
    assert "  > %gelu: f32[batch, sequence, 12] = aten.gelu(%linear)" in str(caught.value)
    assert not gelu._erased


def test_changing_a_call_types_it_anew():
    edit = editor()
    add = only(edit.program, aten.add.Tensor)
    edit.change_call(add, aten.eq.Tensor, *add.args)
    assert nodes.tensor_type(add).dtype is torch.bool
    assert nodes.origin(add).passes == ("test-pass",)
    assert edit.rewritten == 1


def test_erasing_counts_as_a_place_rewritten():
    edit = editor()
    with edit.before(edit.program.output):
        dead = edit.call(aten.neg.default, edit.program.placeholders[0])
    edit.erase(dead)
    assert dead._erased
    assert edit.rewritten == 1


def test_fixed_size_is_number_and_dynamic_one_node():
    edit = editor()
    x = edit.program.placeholders[0]
    with edit.before(edit.program.nodes()[0]):
        batch, width = edit.size(x, 0), edit.size(x, 2)
    assert width == 8
    assert nodes.is_call(batch, aten.sym_size.int)
    assert batch.args == (x, 0)


def test_a_new_weight_gets_a_name_of_its_own():
    edit = editor()
    with edit.before(edit.program.nodes()[0]):
        first = edit.weight("scale", torch.ones(8))
        second = edit.weight("scale", torch.zeros(8))
        third = edit.weight("up.bias", torch.zeros(12))
    assert [str(read.target) for read in (first, second, third)] == ["scale", "scale_1", "up.bias_1"]
    assert edit.program.weight("scale").sum() == 8
    assert nodes.tensor_type(second).shape == (8,)
    assert nodes.origin(first).passes == ("test-pass",)


def test_new_weight_never_hides_module_of_that_name():
    edit = editor()
    with edit.before(edit.program.nodes()[0]):
        read = edit.weight("up", torch.ones(2))
    assert read.target == "up_1"
    verify_structure(edit.program)


def test_set_weight_leaves_the_user_s_weight_alone():
    case = feed_forward()
    program = capture(case.model, case.args).program
    kept = case.model.up.weight.detach().clone()
    copy = program.copy()
    edit = Editor(copy, "test-pass")
    read = only(copy, aten.linear.default).args[1]
    edit.set_weight(read, torch.zeros(12, 8))
    assert torch.equal(case.model.up.weight, kept)
    assert program.weight("up.weight").data_ptr() == case.model.up.weight.data_ptr()
    assert copy.weight("up.weight").eq(0).all()
    assert nodes.origin(read).passes == ("test-pass",)


def test_a_tensor_in_place_of_a_parameter_becomes_one():
    edit = editor()
    read = only(edit.program, aten.linear.default).args[1]
    edit.set_weight(read, torch.zeros(12, 8))
    found = edit.program.weight("up.weight")
    assert isinstance(found, nn.Parameter)
    assert edit.program.own_copy().weight("up.weight").requires_grad
    edit.set_weight(read, torch.zeros(12, 8, dtype=torch.int8))
    assert not edit.program.own_copy().weight("up.weight").requires_grad


def test_set_weight_types_everything_behind_it_anew():
    edit = editor("tied")
    embedding, tanh, head = edit.program.nodes()
    edit.set_weight(embedding.args[0], torch.zeros(50, 6))
    assert [nodes.tensor_type(node).shape[-1] for node in (embedding, tanh, head)] == [6, 6, 50]


def test_set_weight_that_fits_nowhere_is_refused():
    edit = editor()
    up = edit.program.nodes(aten.linear.default)[0]
    with pytest.raises(PassError, match=r"^test-pass: aten.linear does not accept the arguments \[%layer_norm, @up.weight, "):
        edit.set_weight(up.args[2], torch.zeros(6))


def test_a_skip_records_node_place_and_reason():
    edit = editor()
    gelu = only(edit.program, aten.gelu.default)
    edit.skip(gelu, "it is exact already")
    (skip,) = edit.skipped
    assert (skip.node, skip.reason) == ("gelu", "it is exact already")
    assert skip.place.startswith("'gelu' (aten.gelu, models.py:")
    assert edit.rewritten == 0


def test_erased_nodes_are_skipped_and_current_one_is_known():
    edit = editor()
    seen = []
    for node in edit.nodes():
        seen.append(node.name)
        assert edit.current is node
        if node.name == "linear_1":
            dropout = only(edit.program, aten.dropout.default)
            edit.replace(dropout, node)
    assert "dropout" not in seen
    assert seen[-1] == "add"
    assert edit.current is None


def test_data_is_what_the_caller_gave():
    sample = [normal(2, 5, 8)]
    assert Editor(captured("feed_forward"), "test-pass", [sample]).data == [sample]
    assert editor().data == ()
