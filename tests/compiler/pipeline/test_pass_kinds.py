"""Tests of lissom.compiler.pipeline.pass_kinds."""

from dataclasses import dataclass

import pytest
import torch
from torch import fx

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Annotation, Approximation, Pass, Rewrite, Training
from lissom.ops.quantization import fake_quantize
from tests.support.models import captured

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseRms8Norm(Rewrite):
    def run(self, edit: Editor) -> None:
        pass


def test_pass_is_named_after_its_class_in_kebab_case():
    assert RaiseRms8Norm.name() == "raise-rms8-norm"


@pytest.mark.parametrize(
    ("kind", "word"),
    [(Rewrite, "rewrite"), (Approximation, "approximation"), (Annotation, "annotation"), (Training, "training")],
)
def test_each_kind_has_a_word(kind, word):
    assert kind.kind == word
    assert issubclass(kind, Pass)


def test_a_pass_must_say_how_it_runs():
    with pytest.raises(TypeError, match="abstract"):
        Rewrite()


def test_floating_point_weights_are_no_breach():
    assert FLOATING_POINT_WEIGHTS.breach(captured("bert")) is None


def test_integer_weight_of_linear_layer_is_breach():
    program = captured("feed_forward")
    edit = Editor(program, "quantize")
    read = program.nodes(aten.linear.default)[1].args[1]
    with edit.before(program.nodes()[0]):
        integers = edit.weight("down.integers", torch.zeros(8, 12, dtype=torch.int8))
    read.replace_all_uses_with(integers)
    assert FLOATING_POINT_WEIGHTS.breach(program) is integers
    assert FLOATING_POINT_WEIGHTS.sentence(program, "prune-heads", integers) == (
        "prune-heads requires that weights of linear layers are floating point; weight @down.integers: i8[8, 12] breaks it, "
        "made so by quantize: put this pass before the one that quantizes"
    )


def _quantized(name: str, target: object, place: int) -> tuple[Program, fx.Node]:
    """A program whose first layer of a kind reads its weight through a quantizer."""
    program = captured(name)
    layer = program.nodes(target)[0]
    edit = Editor(program, "quantize")
    with edit.before(layer):
        scale = edit.weight("scale", torch.ones(1, 1))
        rounded = edit.call(fake_quantize, layer.args[place], scale, None, format="int8")
    layer.args = (*layer.args[:place], rounded, *layer.args[place + 1 :])
    return program, rounded


@pytest.mark.parametrize(
    ("name", "target", "place"), [("gpt2", aten.addmm.default, 2), ("convolution", aten.conv1d.default, 1)]
)
def test_every_linear_layer_counts_whatever_its_operator(name, target, place):
    program, rounded = _quantized(name, target, place)
    assert FLOATING_POINT_WEIGHTS.breach(program) is rounded


def test_quantized_activations_are_no_breach():
    program, _ = _quantized("feed_forward", aten.linear.default, 0)
    assert FLOATING_POINT_WEIGHTS.breach(program) is None


def test_breach_that_no_pass_made_is_model_s():
    program = captured("feed_forward")
    read = program.nodes(aten.linear.default)[1].args[1]
    assert FLOATING_POINT_WEIGHTS.sentence(program, "prune-heads", read) == (
        "prune-heads requires that weights of linear layers are floating point; weight @down.weight: f32[8, 12] breaks it, "
        "already so in the original model: put this pass before the one that quantizes"
    )
