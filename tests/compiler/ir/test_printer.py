"""Tests of lissom.compiler.ir.printer."""

import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import printer
from lissom.frontends.capture.export import capture
from tests.support.models import captured, feed_forward, normal, tiny_llama

FEED_FORWARD = """\
program FeedForward(x: f32[batch, sequence, 8]) {
  weight @down.bias: f32[8]
  weight @down.weight: f32[8, 12]
  weight @norm.bias: f32[8]
  weight @norm.weight: f32[8]
  weight @up.bias: f32[12]
  weight @up.weight: f32[12, 8]
  %layer_norm: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], @norm.weight, @norm.bias, 1e-05, False)  # norm
  %linear: f32[batch, sequence, 12] = aten.linear(%layer_norm, @up.weight, @up.bias)  # up
  %gelu: f32[batch, sequence, 12] = aten.gelu(%linear)
  %linear_1: f32[batch, sequence, 8] = aten.linear(%gelu, @down.weight, @down.bias)  # down
  %dropout: f32[batch, sequence, 8] = aten.dropout(%linear_1, 0.5, False)  # dropout
  %add: f32[batch, sequence, 8] = aten.add.Tensor(%x, %dropout)
  return [%add]
}
"""

COUNTER = """\
program Counter(x: f32[batch, 4]) {
  weight @linear.bias: f32[4]
  weight @linear.weight: f32[4, 4]
  weight @seen: f32[1] state
  %sym_size_int_1: int batch = aten.sym_size.int(%x, 0)
  %add: f32[1] = aten.add.Tensor(@seen, %sym_size_int_1)
  %linear: f32[batch, 4] = aten.linear(%x, @linear.weight, @linear.bias)  # linear
  %add_4: f32[batch, 4] = aten.add.Tensor(%linear, %add)
  %copy__default: f32[1] = aten.copy_(@seen, %add)
  return [%add_4]
}
"""


def test_a_program_reads_as_text():
    assert captured("feed_forward").text() == FEED_FORWARD


def test_state_and_sizes_read_as_text():
    assert captured("counter").text() == COUNTER


def test_a_copy_has_the_same_text():
    program = captured("llama")
    assert program.copy().text() == program.text()


def test_two_captures_have_the_same_text():
    case = tiny_llama()
    again = capture(case.model, case.args, case.kwargs).program
    assert again.text() == captured("llama").text()


def test_an_example_of_other_sizes_has_the_same_text():
    program = capture(feed_forward().model, (normal(4, 7, 8),)).program
    assert program.text() == FEED_FORWARD


def test_text_holds_no_weight_values():
    program = captured("feed_forward")
    program.set_weight("up.bias", torch.full((12,), 0.123456))
    assert program.text() == FEED_FORWARD


def test_inputs_weights_and_untyped_nodes_read_as_text():
    program = captured("feed_forward")
    read = next(node for node in program if node.op == "get_attr")
    gelu = program.nodes(torch.ops.aten.gelu.default)[0]
    del gelu.meta["val"]
    assert printer.node_text(program, program.placeholders[0]) == "input %x: f32[batch, sequence, 8]"
    assert printer.node_text(program, read) == "weight @norm.weight: f32[8]"
    assert printer.node_text(program, gelu) == "%gelu: untyped = aten.gelu(%linear)"


def test_arguments_read_as_text():
    arguments = [1, 0.5, None, "tanh", True, torch.float16, torch.device("cpu"), torch.strided, 2**63 - 1, (1, [2])]
    assert printer.argument_text(arguments) == "[1, 0.5, None, 'tanh', True, f16, cpu, strided, end, [1, [2]]]"


def test_functions_of_sizes_read_with_their_module():
    program = capture(Doubled(), (normal(2, 3),)).program
    assert "operator.mul(%sym_size_int_1, 2)" in program.text()


class Doubled(nn.Module):
    """Computes a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x]).reshape(x.shape[0] * 2, 3)


def test_excerpt_shows_lines_around_node_and_marks_it():
    program = captured("feed_forward")
    gelu = program.nodes(torch.ops.aten.gelu.default)[0]
    assert printer.excerpt(program, gelu, radius=1) == (
        "    %linear: f32[batch, sequence, 12] = aten.linear(%layer_norm, @up.weight, @up.bias)  # up\n"
        "  > %gelu: f32[batch, sequence, 12] = aten.gelu(%linear)\n"
        "    %linear_1: f32[batch, sequence, 8] = aten.linear(%gelu, @down.weight, @down.bias)  # down"
    )


def test_place_names_node_operator_module_and_line():
    program = captured("feed_forward")
    linear = program.nodes(torch.ops.aten.linear.default)[0]
    line = nodes.origin(linear).source
    assert line.startswith("models.py:")
    assert printer.place(program, linear) == f"'linear' (aten.linear, in up, {line})"
    assert printer.place(program, program.placeholders[0]) == "'x' (placeholder)"


def test_recorded_line_holds_code_that_made_node():
    linear = captured("feed_forward").nodes(torch.ops.aten.linear.default)[0]
    assert nodes.origin(linear).code == "return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))"


def test_a_diff_of_equal_texts_is_empty():
    assert printer.unified_diff(FEED_FORWARD, FEED_FORWARD, "a", "b") == ""


def test_a_diff_shows_the_lines_that_changed():
    found = printer.unified_diff("a\nb\nc\nd\n", "a\nb\nx\nd\n", "0 capture", "1 some-pass")
    assert found == "--- 0 capture\n+++ 1 some-pass\n@@ -2,3 +2,3 @@\n b\n-c\n+x\n d\n"
