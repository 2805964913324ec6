"""Tests of lissom.compiler.verify.structure: that a program is well formed."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.verify.structure import verify_structure
from lissom.errors import VerifyError
from tests.support.models import CASES, captured

aten = torch.ops.aten


def only(program: Program, target: object) -> fx.Node:
    return program.nodes(target)[0]


def refusal(program: Program, before: Program | None = None) -> str:
    with pytest.raises(VerifyError) as caught:
        verify_structure(program, before)
    return str(caught.value)


def marked(message: str) -> list[str]:
    """The lines of an excerpt that are marked as the fault."""
    return [line.removeprefix("  > ") for line in message.splitlines() if line.startswith("  > ")]


def appended(program: Program, target: object, *args: object, typed_as: fx.Node) -> fx.Node:
    """A call at the end of the graph, made behind the editor's back."""
    with program.graph.inserting_before(program.output):
        node = program.graph.call_function(target, args)
    nodes.set_value(node, nodes.value(typed_as))
    return node


@pytest.mark.parametrize("name", CASES)
def test_every_captured_program_is_well_formed(name):
    verify_structure(captured(name))


def test_a_copy_is_well_formed_beside_its_original():
    program = captured("bert")
    verify_structure(program.copy(), program)


def test_a_value_read_before_it_is_made_is_refused():
    program = captured("feed_forward")
    gelu = only(program, aten.gelu.default)
    program.nodes()[0].prepend(gelu)
    found = refusal(program)
    assert found == (
        f"'gelu' (aten.gelu, {nodes.origin(gelu).source}): it reads 'linear', which is defined later or not at all\n"
        "    input %x: f32[batch, sequence, 8]\n"
        "  > %gelu: f32[batch, sequence, 12] = aten.gelu(%linear)\n"
        "    %layer_norm: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], @norm.weight, @norm.bias, 1e-05, False)  # norm\n"
        "    %linear: f32[batch, sequence, 12] = aten.linear(%layer_norm, @up.weight, @up.bias)  # up"
    )


def test_a_name_used_twice_is_refused():
    program = captured("feed_forward")
    only(program, aten.gelu.default).name = "linear"
    assert "the name 'linear' is used twice" in refusal(program)


def test_an_untyped_node_is_refused():
    program = captured("feed_forward")
    del only(program, aten.gelu.default).meta["val"]
    found = refusal(program)
    assert "it has no type; make nodes through the editor" in found
    assert marked(found) == ["%gelu: untyped = aten.gelu(%linear)"]


def test_a_python_function_is_refused():
    program = captured("feed_forward")
    appended(program, torch.relu, program.placeholders[0], typed_as=program.placeholders[0])
    found = refusal(program)
    assert "torch.relu is no ATen or registered operator and no function of sizes" in found.replace("builtins.", "torch.")
    assert len(marked(found)) == 1


def test_an_operator_that_writes_to_its_argument_is_refused():
    program = captured("feed_forward")
    appended(program, aten.relu_.default, program.placeholders[0], typed_as=program.placeholders[0])
    found = refusal(program)
    assert "aten.relu_.default writes to its argument; only buffers listed as state may be written" in found
    assert marked(found) == ["%relu__default: f32[batch, sequence, 8] = aten.relu_(%x)"]


def test_writing_a_buffer_that_is_no_state_is_refused():
    program = captured("counter")
    stateless = Program(program.name, program.graph_module, program.signature, ())
    assert "aten.copy_.default writes to its argument; only buffers listed as state may be written" in refusal(stateless)


def test_a_wrong_type_is_refused():
    program = captured("feed_forward")
    gelu = only(program, aten.gelu.default)
    nodes.set_value(gelu, nodes.value(program.placeholders[0]))
    found = refusal(program)
    assert "it yields f32[batch, sequence, 12] but is typed f32[batch, sequence, 8]" in found
    assert marked(found) == ["%gelu: f32[batch, sequence, 8] = aten.gelu(%linear)"]


def test_a_call_its_operator_refuses_is_refused():
    program = captured("feed_forward")
    gelu = only(program, aten.gelu.default)
    gelu.target, gelu.args = aten.mm.default, (program.placeholders[0], gelu.args[0])
    assert "it does not run on its arguments' types: " in refusal(program)


def test_a_weight_that_is_not_there_is_refused():
    program = captured("feed_forward")
    read = only(program, aten.linear.default).args[1]
    read.target = "up.missing"
    assert "the program has no weight 'up.missing'" in refusal(program)


def test_a_weight_typed_wrongly_is_refused():
    program = captured("feed_forward")
    program.set_weight("up.bias", torch.zeros(3))
    assert "the weight is f32[3] but typed f32[12]" in refusal(program)


def test_an_input_that_differs_from_the_signature_is_refused():
    program = captured("tied")
    (x,) = program.placeholders
    with fake.typing_scope(program.fake_mode):
        nodes.set_value(x, nodes.value(x).int())
    found = refusal(program)
    assert "'tokens' (placeholder): the signature says i64[batch, sequence]" in found
    assert marked(found) == ["input %tokens: i32[batch, sequence]"]


def test_more_inputs_than_the_signature_names_are_refused():
    program = captured("feed_forward")
    program.signature = replace(program.signature, positional=())
    assert refusal(program) == "the program has 1 inputs but its signature names 0"


def test_outputs_of_another_type_than_before_are_refused():
    before, after = captured("feed_forward"), captured("feed_forward")
    after.output.args = ((only(after, aten.gelu.default),),)
    assert refusal(after, before) == (
        "output 0 was f32[batch, sequence, 8] and is now f32[batch, sequence, 12]; a pass keeps the outputs' types"
    )


def test_one_output_less_is_refused():
    before, after = captured("nested"), captured("nested")
    after.output.args = (after.output.args[0][:-1],)
    assert refusal(after, before) == "the program had 5 outputs and has 4 now; a pass keeps the outputs"


def test_node_with_same_name_and_new_arguments_is_retyped():
    before = captured("feed_forward")
    after = before.copy()
    gelu = only(after, aten.gelu.default)
    gelu.args = (after.placeholders[0],)
    assert "it yields f32[batch, sequence, 8] but is typed f32[batch, sequence, 12]" in refusal(after, before)


def test_a_node_behind_a_changed_weight_is_typed_anew():
    before = captured("feed_forward")
    after = before.copy()
    read = only(after, aten.linear.default).args[1]
    after.set_weight("up.weight", torch.zeros(12, 8, dtype=torch.float64))
    nodes.set_value(read, fake.fake_weight(after.fake_mode, after.weight("up.weight")))
    assert "'linear' (aten.linear, in up, " in refusal(after, before)
