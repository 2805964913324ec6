"""Passes the tests of the pipeline run: right ones, wrong ones, and ones that stop in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import (
    FLOATING_POINT_WEIGHTS,
    Annotation,
    Approximation,
    Requirement,
    Rewrite,
    Training,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class DropDropout(Rewrite):
    """Right: removes dropout, and says why it leaves the norms."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.dropout.default):
            edit.replace(node, node.args[0])
        for node in edit.nodes(aten.layer_norm.default):
            edit.skip(node, "a norm is no dropout")


@dataclass(frozen=True)
class DoubleNegation(Rewrite):
    """Right: negates one GELU twice."""

    def run(self, edit: Editor) -> None:
        node = edit.program.nodes(aten.gelu.default)[0]
        with edit.before(node):
            twice = edit.call(aten.neg.default, edit.call(aten.neg.default, edit.call(aten.gelu.default, *node.args)))
        edit.replace(node, twice)


@dataclass(frozen=True)
class DoubleGelu(Rewrite):
    """Wrong: doubles one GELU."""

    which: int = 0

    def run(self, edit: Editor) -> None:
        node = edit.program.nodes(aten.gelu.default)[self.which]
        with edit.before(node):
            gelu = edit.call(aten.gelu.default, *node.args)
            double = edit.call(aten.mul.Tensor, gelu, 2.0)
        edit.replace(node, double)


@dataclass(frozen=True)
class DoubleState(Rewrite):
    """Wrong: writes twice the state."""

    def run(self, edit: Editor) -> None:
        (write,) = edit.program.nodes(aten.copy_.default)
        with edit.before(write):
            double = edit.call(aten.mul.Tensor, write.args[1], 2)
        edit.change_call(write, aten.copy_.default, write.args[0], double)


@dataclass(frozen=True)
class SwapOutputs(Rewrite):
    """Wrong: hands out another node of the same type."""

    def run(self, edit: Editor) -> None:
        edit.program.output.args = ((edit.program.nodes(aten.dropout.default)[0],),)


@dataclass(frozen=True)
class StopsHalfway(Rewrite):
    """Wrong: raises when it has changed something already."""

    def run(self, edit: Editor) -> None:
        for number, node in enumerate(edit.nodes(aten.linear.default)):
            if number == 1:
                raise ZeroDivisionError("division by zero")
            with edit.before(node):
                edit.call(aten.neg.default, node.args[0])


@dataclass(frozen=True)
class Untypes(Rewrite):
    """Wrong: leaves a node without a type."""

    def run(self, edit: Editor) -> None:
        del edit.program.nodes(aten.gelu.default)[0].meta["val"]
        edit.program.edits += 1


@dataclass(frozen=True)
class ShiftsIds(Rewrite):
    """Wrong: its program is typed right and cannot run."""

    def run(self, edit: Editor) -> None:
        (embedding,) = edit.program.nodes(aten.embedding.default)
        with edit.before(embedding):
            shifted = edit.call(aten.add.Tensor, embedding.args[1], 1000)
        edit.change_call(embedding, aten.embedding.default, embedding.args[0], shifted)


@dataclass(frozen=True)
class Interrupts(Rewrite):
    """The user presses Ctrl-C while it runs."""

    def run(self, edit: Editor) -> None:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class WritesInPlace(Rewrite):
    """Wrong: writes into a weight the model owns."""

    def run(self, edit: Editor) -> None:
        with torch.no_grad():
            edit.program.weight("up.bias").add_(0.0)


@dataclass(frozen=True)
class ScaleWeights(Approximation):
    """Lossy: multiplies the weights of the linear layers."""

    factor: float = 1.0

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.linear.default):
            edit.set_weight(node.args[1], edit.program.weight(str(node.args[1].target)).detach() * self.factor)


@dataclass(frozen=True)
class Calibrates(Approximation):
    """Lossy in name: notes how many batches of data it was given."""

    def run(self, edit: Editor) -> None:
        edit.note(f"{len(edit.data)} batches")


@dataclass(frozen=True)
class Marks(Annotation):
    """Changes nothing but the record; with `bits`, wrong: moves the last bits of a weight."""

    bits: int = 0

    def run(self, edit: Editor) -> None:
        node = edit.program.nodes(aten.linear.default)[-1]
        nodes.set_origin(node, nodes.origin(node).changed_by(edit.pass_name))
        if self.bits:
            bias = edit.program.weight(str(node.args[2].target)).detach().clone()
            bias.view(torch.int32).add_(self.bits)
            edit.set_weight(node.args[2], bias)


@dataclass(frozen=True)
class Fits(Training):
    """Trains every parameter for one step towards zero outputs on the calibration data, in place."""

    rate: float = 0.1

    def run(self, edit: Editor) -> None:
        program = edit.program
        parameters = [weight for weight in program.weights().values() if weight.requires_grad]
        with torch.enable_grad():
            sum(program.run(sample)[0].square().mean() for sample in edit.data).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(self.rate * parameter.grad)
                parameter.grad = None


@dataclass(frozen=True)
class IntegerWeights(Rewrite):
    """Puts an integer copy of the last linear layer's weight in its place, cast where it is read."""

    def run(self, edit: Editor) -> None:
        node = edit.program.nodes(aten.linear.default)[-1]
        with edit.before(node):
            integers = edit.weight("integers", torch.zeros(nodes.tensor_type(node.args[1]).shape, dtype=torch.int8))
        node.replace_input_with(node.args[1], integers)


@dataclass(frozen=True)
class NeedsFloats(Rewrite):
    """Asks for floating-point weights."""

    requires: ClassVar[tuple[Requirement, ...]] = (FLOATING_POINT_WEIGHTS,)

    def run(self, edit: Editor) -> None:
        pass
