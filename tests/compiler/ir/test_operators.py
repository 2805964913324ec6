"""Families of operators: members that single lists lacked before there was one, and what works with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn import functional

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.zeros import zero_at, zeros
from lissom.compiler.analysis.structure.linear import features, is_linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import is_activation, is_pointwise, packet_of, reduced_dims
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.removal.indices import remove_indices
from tests.support.harness import Calls, aten, capture_model
from tests.support.models import normal

DEAD = 2
"""The unit that contributes nothing."""


def _without(dim: int, *shape: int) -> torch.Tensor:
    """Random weights, zero at the dead unit along a dimension."""
    return normal(*shape).index_fill(dim, torch.tensor([DEAD]), 0.0)


def _depthwise(self: Calls, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.conv1d(functional.conv1d(x, self.up), self.deep, padding="same", groups=6)
    return functional.conv1d(hidden, self.down)


def _halves(self: Calls, x: torch.Tensor) -> torch.Tensor:
    left, right = functional.linear(x, self.up).tensor_split(2, -1)
    return functional.linear(left, self.down) + right


def _broadcast(self: Calls, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.linear(x, self.up)
    return functional.linear(hidden[:, None].broadcast_to(2, 3, 4, 6), self.down)


@pytest.mark.parametrize(
    ("function", "weights", "x", "target"),
    [
        (
            _depthwise,
            {"up": normal(6, 4, 1), "deep": normal(6, 1, 3, seed=1), "down": _without(1, 3, 6, 1)},
            normal(2, 4, 5),
            aten.conv1d.padding,
        ),
        (_halves, {"up": normal(6, 4), "down": _without(1, 3, 3)}, normal(2, 5, 4), aten.tensor_split.sections),
        (_broadcast, {"up": normal(6, 4), "down": _without(1, 3, 6)}, normal(2, 4, 4), aten.broadcast_to.default),
    ],
    ids=["depthwise, padding same", "tensor_split", "broadcast_to"],
)
def test_units_are_removed_through_every_member(
    function: Callable[..., object], weights: dict[str, torch.Tensor], x: torch.Tensor, target: object
) -> None:
    program = capture_model(Calls(function, **weights), x, dynamic=False).program
    (wanted,) = program.run([x])
    assert [node.target for node in program.nodes(target)] == [target]
    found = program.fact(axes)
    down = next(node for node in program.graph.nodes if node.op == "get_attr" and str(node.target).endswith("down"))
    remove_indices(Editor(program, "remove"), {found.axis(down, 1): [DEAD]})
    assert program.weight(str(down.target)).shape[1] == weights["down"].shape[1] - 1
    (have,) = program.run([x])
    # Sums of fewer terms.
    torch.testing.assert_close(have, wanted, atol=1e-6, rtol=1e-5)


def _call(function: Callable[..., object], x: torch.Tensor, target: object, **weights: torch.Tensor) -> tuple[Program, fx.Node]:
    program = capture_model(Calls(function, **weights), x, dynamic=False).program
    (node,) = program.nodes(target)
    return program, node


@pytest.mark.parametrize("padding", [0, "same"])
def test_every_convolution_is_linear_layer_and_knows_its_zeros(padding: int | str) -> None:
    target = aten.conv3d.padding if padding else aten.conv3d.default
    weight = _without(0, 6, 4, 1, 1, 1)
    program, node = _call(
        lambda self, x: functional.conv3d(x, self.weight, padding=padding), normal(1, 4, 2, 2, 2), target, weight=weight
    )
    assert is_linear(node)
    assert (features(node, 0), features(node, 1)) == (6, 4)
    assert zero_at(program.fact(zeros), node, 1).nonzero().flatten().tolist() == [DEAD]


def test_values_taken_along_a_dimension_have_axes() -> None:
    index = torch.tensor([[1, 0], [0, 2]])
    program, node = _call(
        lambda x: x.take_along_dim(torch.tensor([[1, 0], [0, 2]]), 1), normal(2, 3), aten.take_along_dim.default
    )
    assert [axis.size for axis in program.fact(axes).of[node]] == list(index.shape)


def test_best_of_row_leaves_other_axes_free() -> None:
    program, node = _call(
        lambda self, x: functional.linear(x, self.up).max(1)[0] * 2, normal(2, 5, 4), aten.max.dim, up=normal(6, 4)
    )
    values, indices = program.fact(axes).of[node]
    (up,) = program.nodes(aten.linear.default)
    assert values[1] is indices[1]
    assert values[1].find() is program.fact(axes).axis(up, 2)


@pytest.mark.parametrize(
    ("function", "pointwise", "activation"),
    [
        (functional.gelu, True, True),
        (functional.hardswish, True, True),
        (lambda x: x * 2, True, False),
        (lambda x: torch.where(x > 0, x, 0.0), True, False),
        (lambda x: x.lerp(x * 2, 0.5), True, False),
        (lambda x: x.softmax(-1), False, False),
    ],
)
def test_activations_are_told_from_other_element_wise_operators(
    function: Callable[..., object], pointwise: bool, activation: bool
) -> None:
    program = capture_model(Calls(function), normal(2, 3), dynamic=False).program
    last = list(program.nodes())[-1]
    assert (is_pointwise(last), is_activation(last)) == (pointwise, activation)


def test_an_overload_belongs_to_its_operator() -> None:
    _, node = _call(lambda x: x.add(1), normal(2, 3), aten.add.Tensor)
    assert packet_of(node) is aten.add


def test_norms_of_vectors_have_their_order_before_the_dimensions() -> None:
    _, node = _call(lambda x: torch.linalg.vector_norm(x, 2, -1), normal(2, 3), aten.linalg_vector_norm.default)
    assert reduced_dims(node, 2) == {1}
    _, node = _call(lambda x: x.sum(), normal(2, 3), aten.sum.default)
    assert reduced_dims(node, 2) == {0, 1}
