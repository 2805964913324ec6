"""Tests of positions: changing an operand elsewhere leaves a position of the result as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn import functional

from lissom.compiler.analysis.token_positions import operands, position_sources, row_position, shape_of, with_operands
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import call
from lissom.ops.quantization import fake_quantize, fake_quantize_dynamic
from tests.support.harness import Calls, aten, capture_model
from tests.support.models import normal

SQUARE = normal(3, 4, 4)

FUNCTIONS: dict[str, Callable[..., object]] = {
    "pointwise": lambda x: torch.where(x > 0, x * x[:1], x[:, :1]).to(torch.float64),
    "linear": lambda x: functional.linear(x, x[0], x[0, 0]),
    "norm": lambda x: functional.layer_norm(x, (4,)),
    "softmax": lambda x: x.softmax(1) + x.cumsum(-1),
    "reduce": lambda x: (x.mean(1), x.sum((0, 2), keepdim=True), x.amax(-1)),
    "views": lambda x: x.transpose(0, 1).permute(2, 0, 1).unsqueeze(1)[:, 0].squeeze(0),
    "reshape": lambda x: x.reshape(3, 2, 2, 4).flatten(2).reshape(6, 2, 4),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2),
    "expand": lambda x: x[:, None].expand(3, 5, 4, 4).reshape(15, 4, 4),
    "pieces": lambda x: (*x.split(2, 1), *x.unbind(0), *x.chunk(2, -1)),
    "joined": lambda x: (torch.cat([x, x], 1), torch.stack([x, x], 2)),
    "matmul": lambda x: x @ x.transpose(1, 2) @ x[0],
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "lookup": lambda x: x.index_select(1, torch.tensor([2, 0, 1])),
    "sorted": lambda x: (x.topk(2, 1)[0], x.flip(0), x.sort(-1)[0]),
    "convolution": lambda x: functional.conv1d(x, x[:, :, :1], padding="same"),
    "other views": lambda x: (
        x.roll(1, 1),
        x.repeat(2, 1, 1),
        x.mT,
        x.swapaxes(0, 1),
        x.broadcast_to(2, 3, 4, 4),
        x[None].squeeze(),
    ),
    "padded": lambda x: functional.pad(x, (1, 0, 0, 2)),
    "in equal parts": lambda x: x.tensor_split(2, 1),
    "more reductions": lambda x: (x.std(1), x.logsumexp(-1), x.max(0)[1], x.all(), torch.linalg.vector_norm(x, dim=2)),
    "quantized": lambda x: (
        fake_quantize(x, torch.tensor(0.01), format="int8"),
        fake_quantize(x, torch.full((1, 1, 4), 0.01), format="int8"),
        *(fake_quantize_dynamic(x, format="int8", granularity=by) for by in ("token", "tensor")),
        fake_quantize_dynamic(x.repeat(1, 1, 8), format="int8", granularity="group"),
    ),
    "sizes of another": lambda x: (x[:, :1].expand_as(x), x.reshape(3, 16).view_as(x)),
}


def program_of(function: Callable[..., object]) -> fx.Graph:
    return capture_model(Calls(function), SQUARE, dynamic=False).program


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_position_depends_on_its_own_alone(name: str) -> None:
    program = program_of(FUNCTIONS[name])
    values: dict[fx.Node, object] = {}
    program.run([SQUARE], lambda node, value: values.update({node: value}))
    values |= {node: SQUARE for node in program.placeholders}
    values |= {node: program.weight(str(node.target)) for node in program if node.op == "get_attr"}
    asked = 0
    for node in program.nodes():
        for dim, size in enumerate(shape_of(node) if operands(node) and nodes.node_type(node) is not None else ()):
            sources = position_sources(node, dim)
            for index in range(size if sources else 0):
                wanted, found = values[node], call(*_disturbed(node, sources, index, values))
                asked += 1
                for left, right in zip(*map(_tensors, (wanted, found)), strict=True):
                    torch.testing.assert_close(left.select(dim, index), right.select(dim, index))
    assert asked > 0


def _disturbed(node: fx.Node, sources: dict, index: int, values: dict) -> tuple[fx.Node, Callable]:
    """The call with every other position of the operands it comes from changed."""
    graph = fx.Graph()
    changed = {}
    for slot, item in operands(node).items():
        changed[slot] = graph.placeholder(f"p{len(changed)}")
        tensor = values[item]
        if slot in sources:
            parts = [_elsewhere(part, sources[slot], index) for part in _tensors(tensor)]
            tensor = parts[0] if isinstance(tensor, torch.Tensor) else parts
        values[changed[slot]] = tensor
    args, kwargs = with_operands(node, changed)
    return graph.call_function(node.target, tuple(args), kwargs), values.__getitem__


def _elsewhere(tensor: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """The tensor with everything changed but one position of a dimension."""
    kept = torch.arange(tensor.shape[dim]).eq(index).reshape(-1, *[1] * (tensor.dim() - dim - 1))
    return torch.where(kept, tensor, tensor * -2 + 1 if tensor.is_floating_point() else torch.zeros_like(tensor))


def _tensors(value: object) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize(
    ("function", "target", "dims"),
    [
        (FUNCTIONS["linear"], aten.linear.default, [True, True, False]),
        (FUNCTIONS["norm"], aten.layer_norm.default, [True, True, False]),
        (FUNCTIONS["attention"], aten.scaled_dot_product_attention.default, [True, True, True, True]),
        (lambda x: x.softmax(1), aten.softmax.int, [True, False, True]),
        (lambda x: x.reshape(12, 4), aten.reshape.default, [False, True]),
        (lambda x: x.roll(1, 1), aten.roll.default, [True, False, True]),
        (lambda x: x.roll(1), aten.roll.default, [False, False, False]),
        (lambda x: fake_quantize(x, torch.tensor(0.01), format="int8"), fake_quantize, [True, True, True]),
        (lambda x: fake_quantize(x, torch.full((1, 1, 4), 0.01), format="int8"), fake_quantize, [False, False, False]),
        (lambda x: fake_quantize_dynamic(x, format="int8"), fake_quantize_dynamic, [True, True, False]),
    ],
)
def test_which_dimensions_work_position_by_position(function: Callable, target: object, dims: list[bool]) -> None:
    (node,) = program_of(function).nodes(target)
    assert [position_sources(node, dim) is not None for dim in range(len(dims))] == dims


def test_a_query_needs_every_key() -> None:
    (node,) = program_of(FUNCTIONS["attention"]).nodes(aten.scaled_dot_product_attention.default)
    assert position_sources(node, 2) == {0: 2}


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x[torch.arange(x.shape[0]), x.argmax(1)[:, 0]], True),
        (lambda x: x[torch.arange(x.shape[0]).flip(0), x.argmax(1)[:, 0]], False),
        (lambda x: x[x.argmax(1)[:, 0] // 2], False),
    ],
)
def test_one_position_a_row(function: Callable, found: bool) -> None:
    program = capture_model(Calls(function), SQUARE.abs()).program
    (node,) = program.nodes(aten.index.Tensor)
    assert (row_position(program, node) is not None) == found
