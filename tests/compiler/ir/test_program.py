"""Tests of lissom.compiler.ir.program."""

import pytest
import torch
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.errors import InputError
from lissom.frontends.capture.export import capture
from tests.support.models import captured, feed_forward, normal

aten = torch.ops.aten


def count_calls(program: Program) -> int:
    count_calls.runs += 1
    return len(program.nodes())


def test_a_fact_is_computed_once_until_the_next_edit():
    program = captured("feed_forward")
    count_calls.runs = 0
    assert program.fact(count_calls) == program.fact(count_calls) == 6
    assert count_calls.runs == 1
    program.set_weight("up.bias", torch.zeros(12))
    assert program.fact(count_calls) == 6
    assert count_calls.runs == 2


def test_nodes_are_all_calls_or_those_of_targets():
    program = captured("feed_forward")
    assert [node.name for node in program.nodes()] == ["layer_norm", "linear", "gelu", "linear_1", "dropout", "add"]
    assert [node.name for node in program.nodes(aten.linear.default)] == ["linear", "linear_1"]
    assert next(iter(program)).op == "placeholder"


def test_weights_come_by_name_in_order_of_use():
    program = captured("feed_forward")
    assert list(program.weights()) == ["norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"]


def test_weight_that_is_not_there_is_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        captured("feed_forward").weight("nothing")


def test_name_is_taken_by_weight_or_weight_container():
    program = captured("feed_forward")
    assert program.has_weight("up.bias")
    assert not program.has_weight("up")
    assert not program.has_weight("training")
    assert all(map(program.is_taken, ("up", "up.bias", "training")))
    assert not program.has_weight("up.scale")


def test_set_weight_changes_this_program_alone():
    program = captured("feed_forward")
    other = program.copy()
    old = program.weight("up.bias")
    program.set_weight("up.bias", torch.ones(12))
    assert program.weight("up.bias").eq(1).all()
    assert other.weight("up.bias") is old


def test_set_weight_makes_the_containers_a_new_name_needs():
    program = captured("feed_forward")
    program.set_weight("folded.deep.scale", nn.Parameter(torch.ones(2)))
    assert program.weight("folded.deep.scale").shape == (2,)
    assert "folded.deep.scale" in dict(program.graph_module.named_parameters())


def test_a_parameter_may_become_a_buffer():
    program = captured("feed_forward")
    program.set_weight("up.bias", torch.zeros(12))
    assert "up.bias" in dict(program.graph_module.named_buffers())
    assert "up.bias" not in dict(program.graph_module.named_parameters())


def test_parameters_are_counted_in_elements_and_bytes():
    program = captured("feed_forward")
    elements = 8 + 8 + 8 * 12 + 12 + 12 * 8 + 8
    assert program.parameter_count == elements
    assert program.parameter_bytes == 4 * elements


class Halves(nn.Module):
    """Two weights that are halves of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(32.0).reshape(8, 4)
        self.register_buffer("first", whole[:4])
        self.register_buffer("second", whole[4:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first + x @ self.second


def test_halves_of_one_tensor_are_both_counted():
    program = capture(Halves(), (normal(2, 4),)).program
    assert program.parameter_bytes == 32 * 4


class Shared(nn.Module):
    """Two buffers that are the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(4, 4))
        self.register_buffer("transposed", self.weight.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + x @ self.transposed


def test_memory_that_two_weights_share_is_counted_once():
    program = capture(Shared(), (normal(2, 4),)).program
    assert len(program.weights()) == 2
    assert program.parameter_bytes == 16 * 4


def test_copy_has_its_own_graph_and_same_weights():
    program = captured("feed_forward")
    copy = program.copy()
    copy.graph.erase_node(copy.graph.call_function(aten.neg.default, (copy.placeholders[0],)))
    assert copy.graph is not program.graph
    assert copy.text() == program.text()
    assert all(copy.weight(name) is tensor for name, tensor in program.weights().items())


def test_running_shows_every_call_in_order():
    seen = []
    program = captured("feed_forward")
    program.run([normal(2, 5, 8)], lambda node, value: seen.append((node.name, tuple(value.shape))))
    assert seen[0] == ("layer_norm", (2, 5, 8))
    assert [name for name, _ in seen] == [node.name for node in program.nodes()]


def test_gradients_flow_to_the_weights_of_a_trainable_copy():
    case = feed_forward()
    program = capture(case.model, case.args).program
    trained = program.own_copy()
    trained(*case.args).sum().backward()
    assert trained.weight("up.weight").grad.abs().sum() > 0
    assert case.model.up.weight.grad is None
    assert program.weight("up.weight").grad is None


def test_a_call_is_checked_and_a_run_is_not():
    program = captured("feed_forward")
    with pytest.raises(InputError, match="has size 3 in dimension 2"):
        program(normal(2, 5, 3))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        program.run([normal(2, 5, 3)])


def test_dead_nodes_and_their_weights_are_dropped():
    program = captured("feed_forward")
    dropout, add = program.nodes(aten.dropout.default)[0], program.nodes(aten.add.Tensor)[0]
    add.replace_input_with(dropout, program.placeholders[0])
    assert program.drop_dead() == 11
    assert [node.name for node in program.nodes()] == ["add"]
    assert program.weights() == {}
    assert not program.has_weight("up.weight")


def test_writes_of_state_are_not_dead():
    program = captured("counter")
    assert program.drop_dead() == 0
    assert program.nodes(aten.copy_.default)


def test_str_is_the_text():
    program = captured("tied")
    assert str(program) == program.text()
    assert repr(program).startswith(f"<Program {program.name}(") and "\n" not in repr(program)


def test_trainable_module_is_trained_in_loop_of_ones_own():
    case = feed_forward()
    program = capture(case.model, case.args).program
    module = program.trainable()
    assert dict(module.named_parameters()).keys() == dict(case.model.named_parameters()).keys()
    assert torch.equal(module(*case.args), case.model(*case.args))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(*case.args).square().mean().backward()
    optimizer.step()
    after = program.with_weights(module)
    assert torch.equal(after(*case.args), module(*case.args))
    assert not any(weight.requires_grad for weight in after.weights().values())
    assert torch.equal(program(*case.args), case.model(*case.args))
    assert case.model.up.weight.grad is None and after.text() == program.text()


def test_a_trainable_module_moves_through_a_state_dict():
    case = feed_forward()
    program = capture(case.model, case.args).program
    first, second = program.trainable(), program.trainable()
    with torch.no_grad():
        first.get_parameter("up.weight").add_(1.0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(program.with_weights(second)(*case.args), first(*case.args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: delattr(module.up, "weight"), "the module has no weight 'up.weight'; give the module that"),
        (
            lambda module: module.up.register_parameter("weight", torch.nn.Parameter(torch.zeros(1))),
            r"is \[1\] of torch.float32",
        ),
        (lambda module: module.up.double(), "of torch.float64, and "),
        (lambda module: module.up.weight.data.fill_(float("nan")), r"the weight 'up\.weight' holds infinities or NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    program = captured("feed_forward")
    module = program.trainable()
    change(module)
    with pytest.raises(InputError, match=message):
        program.with_weights(module)
