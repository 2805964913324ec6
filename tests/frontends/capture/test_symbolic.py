"""Tests of graphs made by torch.fx.symbolic_trace: they are modules, and come in through the same door."""

import pytest
import torch
from torch import fx, nn

import lissom
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.errors import CaptureError
from lissom.frontends.capture.export import capture
from tests.support.models import FeedForward, feed_forward, normal, seeded


class Mixed(nn.Module):
    """Calls modules, functions and methods, reads a parameter, and takes a mask that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FeedForward()
        self.second = FeedForward()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None, gain: float = 2.0) -> torch.Tensor:
        y = self.second(self.first(x)).transpose(1, 2).transpose(1, 2)
        y = torch.softmax(y * self.scale, -1) * gain
        return y.view(x.size(0), -1, 8)


class Pair(nn.Module):
    """Gives two results in a mapping, and takes two inputs that are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"difference": self.linear(x) - y, "x": x.relu()}


def mixed() -> Mixed:
    return seeded(Mixed)


def origins(program: Program) -> dict[str, nodes.Origin]:
    return {node.name: nodes.origin(node) for node in program.nodes()}


def test_a_traced_graph_becomes_the_program_its_module_does():
    model = mixed()
    traced = capture(fx.symbolic_trace(model), (normal(2, 5, 8),)).program
    assert traced.text() == capture(model, (normal(2, 5, 8),)).program.text()


def test_it_compiles_and_computes_what_the_module_does():
    model = mixed()
    fast = lissom.compile(fx.symbolic_trace(model), normal(2, 5, 8))
    x = normal(3, 7, 8, seed=1)
    with torch.no_grad():
        # Layers of at most twelve inputs, whose products are summed in another order.
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=2e-6)


def test_modules_functions_and_methods_keep_their_module_path():
    found = origins(capture(fx.symbolic_trace(mixed()), (normal(2, 5, 8),)).program)
    assert found["linear"].module_path == "first.up"
    assert found["gelu_1"].module_path == "second"
    assert found["add"].module_path == "first"
    assert found["transpose"].module_path == found["softmax"].module_path == ""


def test_source_lines_come_through_where_the_tracer_recorded_them():
    model = mixed()
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    found = origins(capture(fx.GraphModule(model, tracer.trace(model)), (normal(2, 5, 8),)).program)
    assert found["gelu"].source == "models.py:" + found["linear"].source.partition(":")[2]
    assert found["softmax"].code == "y = torch.softmax(y * self.scale, -1) * gain"


def test_weights_keep_their_names_and_are_shared():
    model = mixed()
    program = capture(fx.symbolic_trace(model), (normal(2, 5, 8),)).program
    assert program.weight("scale").data_ptr() == model.scale.data_ptr()
    assert program.weight("second.up.weight").data_ptr() == model.second.up.weight.data_ptr()


def test_traced_training_graph_is_captured_in_evaluation_mode():
    traced = fx.symbolic_trace(feed_forward().model).train()
    program = capture(traced, (normal(2, 5, 8),)).program
    assert program.text() == capture(feed_forward().model, (normal(2, 5, 8),)).program.text()
    assert traced.dropout.training


@pytest.mark.parametrize("names", [("x", "y"), ("y", "x")])
def test_keywords_may_come_in_any_order(names):
    model = seeded(Pair)
    values = {"x": normal(2, 5, 8), "y": normal(2, 5, 8, seed=1)}
    program = capture(fx.symbolic_trace(model), (), {name: values[name] for name in names}).program
    found = program(**values)
    with torch.no_grad():
        wanted = model(**values)
    assert list(found) == list(wanted)
    # The same operators on the same values: nothing is rounded another way.
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_an_argument_that_is_left_out_keeps_its_default():
    program = capture(fx.symbolic_trace(mixed()), (), {"x": normal(2, 5, 8)}).program
    assert program.signature.describe() == "(*, x: f32[batch, sequence, 8])"


def test_argument_after_an_omitted_one_is_not_confused():
    program = capture(fx.symbolic_trace(mixed()), (), {"gain": 3.0, "x": normal(2, 5, 8)}).program
    assert program.signature.describe() == "(*, x: f32[batch, sequence, 8], shift=None, gain=3.0)"


def test_uncapturable_graph_names_the_line_of_its_node():
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 7)

    model = Fixed()
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    with pytest.raises(CaptureError) as caught:
        capture(fx.GraphModule(model, tracer.trace(model), "Fixed"), (normal(2, 5),), dynamic=False)
    assert str(caught.value).startswith("Fixed cannot be captured: test_symbolic.py:")
    assert "`return x.reshape(3, 7)`" in str(caught.value)
