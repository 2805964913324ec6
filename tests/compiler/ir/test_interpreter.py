"""Tests of lissom.compiler.ir.interpreter."""

import weakref

import pytest
import torch
from torch import nn

from lissom.compiler.ir.interpreter import call, evaluate_nodes, last_uses_of, run
from lissom.frontends.capture.export import capture
from tests.support.models import CASES, captured, normal

aten = torch.ops.aten


@pytest.mark.parametrize("name", ["feed_forward", "tied", "convolution", "bert", "llama", "t5", "gpt2"])
def test_running_the_graph_gives_what_the_model_gives(name):
    case, program = CASES[name](), captured(name)
    with torch.no_grad():
        wanted = case.model(*case.args, **case.kwargs)
        found = program.run(program.signature.flatten(case.args, case.kwargs))
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
    # The same kernels in the same order: only oneDNN's choice of blocking could move the last bit.
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_program_as_captured_runs_with_gradients(name):
    case, program = CASES[name](), captured(name).own_copy()
    program.run(program.signature.flatten(case.args, case.kwargs))[0].sum().backward()
    assert any(weight.grad is not None for weight in program.weights().values())


def test_every_value_is_last_used_once():
    program = captured("llama")
    freed = [used for found in last_uses_of(program.graph).values() for used in found]
    kept = set(program.output.all_input_nodes)
    assert len(freed) == len(set(freed))
    assert set(freed) | kept == {node for node in program if node.op != "output"}
    assert not kept & set(freed)


def test_a_value_nothing_reads_is_freed_at_once():
    program = captured("feed_forward")
    with program.graph.inserting_before(program.nodes()[0]):
        dead = program.graph.call_function(aten.neg.default, (program.placeholders[0],))
    assert last_uses_of(program.graph)[dead] == [dead]


def test_values_are_freed_after_their_last_use():
    program = captured("feed_forward")
    seen: list[weakref.ref] = []
    held = {}

    def observe(node, value):
        held[node.name] = len({id(found()) for found in seen if found() is not None} - {id(value)})
        seen.append(weakref.ref(value))

    with torch.no_grad():
        program.run([normal(2, 5, 8)], observe)
    # When a value has just been computed, the one it was computed from is still held, and no other is; dropout outside of
    # training gives back the very tensor it was given.
    assert held == {"layer_norm": 0, "linear": 1, "gelu": 1, "linear_1": 1, "dropout": 0, "add": 1}


def test_a_value_an_observer_returns_replaces_the_result():
    program, x = captured("feed_forward"), normal(2, 5, 8)
    (found,) = program.run([x], lambda node, value: torch.zeros_like(value) if node.name == "linear_1" else None)
    assert torch.equal(found, x)


def test_arguments_in_lists_and_keywords_take_their_values():
    program = captured("llama")
    cat = program.nodes(aten.cat.default)[0]
    assert torch.equal(call(cat, lambda node: torch.ones(1, 2, 2)), torch.ones(1, 2, 4))


def test_constant_outputs_come_as_they_are():
    program = captured("nested")
    found = run(program.graph, program.graph_module, [normal(2, 3, 4), normal(2, 3, 4)])
    assert found[3:] == [None, True]


class Folded(nn.Module):
    """Adds a product of weights to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(3) * 2)
        self.right = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.left @ self.right + self.left).relu()


def test_a_node_of_weights_alone_is_evaluated():
    program = capture(Folded(), (normal(3, 3),)).program
    found = evaluate_nodes(program.graph_module, program.nodes(aten.relu.default)[0])
    assert torch.equal(found, torch.ones(3, 3) * 2 + torch.eye(3) * 2)
    assert not found.requires_grad
