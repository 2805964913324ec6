"""Tests of lissom.frontends.capture.flatten: an exported program as ours."""

import pytest
import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.signature import ConstantArgument, TensorArgument
from lissom.errors import CaptureError
from lissom.frontends.capture.export import capture
from lissom.frontends.capture.flatten import flatten_exported
from tests.support import captures
from tests.support.mixtures import mixture, samples, stacked_products
from tests.support.models import captured, feed_forward, normal, tokens
from tests.support.neighbours import all_but_slow

aten = torch.ops.aten


def test_every_node_is_typed_and_every_call_has_origin(case):
    program = capture(case.model, case.args, case.kwargs, dynamic=False).program
    assert all(nodes.has_value(node) for node in program if node.op != "output")
    assert all(nodes.origin(node).source for node in program.nodes(aten.linear.default))
    assert all(nodes.origin(node).passes == () for node in program.nodes())


def test_nothing_of_the_export_stays_on_a_node():
    program = captured("bert")
    assert {key for node in program for key in node.meta} == {"val", "lissom_origin"}


def test_a_weight_is_read_right_before_its_first_use():
    ops = [node.op for node in captured("feed_forward")]
    assert ops[:4] == ["placeholder", "get_attr", "get_attr", "call_function"]


def test_weights_the_graph_does_not_read_are_left_out():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    program = capture(Unused(), (normal(2, 3),)).program
    assert list(program.weights()) == ["used.weight", "used.bias"]
    assert not program.has_weight("unused.weight")


def test_a_tensor_made_in_forward_becomes_a_weight():
    class Literal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tensor([1.0, 2.0, 3.0])

    program = capture(Literal(), (normal(2, 3),)).program
    (name,) = program.weights()
    assert program.weight(name).tolist() == [1.0, 2.0, 3.0]


def test_buffer_that_is_not_saved_is_weight_too():
    assert "model.rotary_emb.inv_freq" in captured("llama").weights()


def test_inputs_of_equal_size_share_their_dimensions():
    signature = captured("bert").signature
    ids, mask = signature.tensors
    assert ids.type.shape == mask.type.shape
    assert [dimension.name for dimension in signature.dimensions.values()] == ["batch", "sequence"]


class TwoSequences(nn.Module):
    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return source.sum(1, keepdim=True) + target


def test_inputs_of_other_sizes_have_dimensions_of_their_own():
    program = capture(TwoSequences(), (normal(2, 5), normal(2, 3))).program
    assert program.signature.describe() == "(source: f32[batch, sequence], target: f32[batch, target_sequence])"
    assert program(normal(4, 2), normal(4, 7)).shape == (4, 7)


def test_leaves_of_an_argument_are_tensors_or_constants():
    (past, double) = captured("nested").signature.keyword
    assert [type(leaf) for leaf in past.leaves] == [TensorArgument, TensorArgument]
    assert [type(leaf) for leaf in double.leaves] == [ConstantArgument]
    assert double.constant
    assert not past.constant


class Outputs(nn.Module):
    """Returns its input, a weight, a number, None, and a value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, scale: float) -> tuple[object, ...]:
        y = x * scale
        return x, self.weight, scale, None, y, y


def test_outputs_may_be_inputs_weights_numbers_none_or_repeated():
    model = Outputs()
    program = capture(model, (normal(2, 3), 2.0)).program
    x = normal(4, 3)
    same, weight, scale, nothing, first, second = program(x, 2.0)
    assert torch.equal(same, x)
    assert torch.equal(weight, model.weight)
    assert (scale, nothing) == (2.0, None)
    assert first is second


def test_dtypes_that_capture_evaluates_leave_no_calls():
    class Promoted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.promote_types(x.dtype, torch.float64)).to(torch.result_type(x, 2))

    program = capture(Promoted(), (normal(2, 3),)).program
    assert {node.target for node in program.nodes()} == {aten._assert_tensor_metadata.default, aten.to.dtype}
    assert [node.args[1] for node in program.nodes(aten.to.dtype)] == [torch.float64, torch.float32]


def test_the_batch_size_as_an_output_is_a_number():
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x + 1, x.shape[0]

    program = capture(Sizes(), (normal(2, 3),)).program
    assert program(normal(5, 3))[1] == 5


def test_state_is_written_after_everything_else():
    program = captured("counter")
    assert program.nodes()[-1].target is aten.copy_.default
    assert "weight @seen: f32[1] state" in program.text()


class TwoStates(nn.Module):
    """Counts rows, and keeps the last input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x + self.last
        self.rows.add_(x.shape[0])
        self.last.copy_(x)
        return result


def test_several_buffers_may_be_state():
    model = TwoStates()
    program = capture(model, (normal(2, 3),)).program
    assert sorted(program.state) == ["last", "rows"]
    first, second = normal(2, 3, seed=1), normal(2, 3, seed=2)
    assert torch.equal(program(first), first)
    assert torch.equal(program(second), first + second)
    assert model.last.eq(0).all()


def test_an_export_with_a_custom_object_is_refused():
    exported = torch.export.export(feed_forward().model, (normal(2, 5, 8),), strict=False)
    spec = exported.graph_signature.input_specs[0]
    spec.kind = torch.export.graph_signature.InputKind.CUSTOM_OBJ
    with pytest.raises(CaptureError, match=r"the model uses a custom_obj \('norm.weight'\), which a program cannot hold"):
        flatten_exported(exported, "FeedForward", (normal(2, 5, 8),), {}, ("x",))


def test_an_embedding_that_is_only_indexed_shares_its_batch():
    class Masked(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(ids.shape[0])
            return ids * mask[rows]

    program = capture(Masked(), (tokens(), tokens(seed=1))).program
    assert program.signature.describe() == "(ids: i64[batch, sequence], mask: i64[batch, sequence])"


@pytest.mark.parametrize("dtype", all_but_slow([torch.float32, torch.bfloat16], torch.float32))
def test_grouped_products_of_both_packages_become_one_operator(dtype: torch.dtype) -> None:
    """In bfloat16 transformers calls `aten._grouped_mm`, in float32 an operator of its own."""
    found = captures.optimize(mixture("mixtral").to(dtype), samples(1)[0], checks="structural").program
    assert [nodes.tensor_type(node).dtype for node in stacked_products(found)] == [dtype, dtype]
    assert not found.nodes(torch.ops.aten._grouped_mm.default)
